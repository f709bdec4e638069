// The stage: a live session, speech into it by microphone or file, its picture and state.

import { call, send, socketUrl } from "./calls.js";
import { $, choose, faces, fillSelect, note, onFaces, pictureUrl, problem } from "./common.js";
import { LivePlayer, WhepPlayer } from "./player.js";
import { say } from "./words.js";

const video = $("live");
let session = null; // what POST /v1/sessions answered
let audio = null; // the socket for speech
let player = null;
let microphone = null;
let wanted = false; // a session, by the person

function show(state) {
  $("screen").dataset.state = state;
  $("badge-text").textContent = ["idle", "talking", "wait"].includes(state) ? say(state) : "";
  $("empty").hidden = state !== "empty";
  $("poster").hidden = state === "idle" || state === "talking" || !$("poster").src || state === "empty";
  $("interrupt").disabled = !session;
  $("microphone").disabled = $("speak-file").disabled = !session && !faces.chosen;
  $("connect").textContent = say(session ? "end" : "goLive");
  $("connect").classList.toggle("primary", !session);
  $("connect").disabled = !session && !faces.chosen;
}

export function showStage() {
  fillSelect($("live-template"));
  const face = faces.all.find(({ id }) => id === faces.chosen);
  if (face) $("poster").src = pictureUrl(face.id, face.processed_at);
  else $("poster").removeAttribute("src");
  if (!session) show(face ? "ready" : "empty");
  else show($("screen").dataset.state);
}

const byWebrtc = () => $("watch").value === "webrtc";

async function start() {
  if (!byWebrtc() && !window.MediaSource) return problem({ message: say("noMse"), hint: say("noMseHint") });
  wanted = true;
  show("wait");
  video.muted = false;
  video.play().catch(() => {});
  try {
    session = await send("/v1/sessions", { template_id: faces.chosen });
  } catch (error) {
    problem(error);
    wanted = false;
    return showStage();
  }
  watch();
  await openAudio();
  note("live-note", () => say("liveHint"));
  show("wait");
}

function watch() {
  const { addresses } = session;
  const lost = (final) => (final ? stop() : note("live-note", () => say("lost")));
  player?.close();
  player = byWebrtc() ? new WhepPlayer(video, addresses.whep, lost) : new LivePlayer(video, addresses.video, lost);
}

async function offerWebrtc() {
  const { webrtc } = await call("GET", "/v1/sessions");
  $("watch-field").hidden = !(webrtc && window.RTCPeerConnection);
  if (!$("watch-field").hidden && localStorage.getItem("watch") === "webrtc") $("watch").value = "webrtc";
}

function openAudio() {
  const mine = session;
  audio = new WebSocket(socketUrl(session.addresses.audio));
  audio.onmessage = ({ data }) => heed(JSON.parse(data));
  audio.onclose = ({ code }) => {
    if (session !== mine) return;
    if ([4404, 4410].includes(code)) stop();
    else setTimeout(() => session === mine && openAudio(), 500);
  };
  return new Promise((resolve) => { audio.onopen = resolve; setTimeout(resolve, 3000); });
}

function heed(event) {
  if (event.type === "state") show(event.state);
  else if (event.type === "interrupted") {
    note("live-note", () => say("interrupted", { s: event.position.toFixed(2) }));
    player?.toEdge();
  } else if (event.type === "error" || event.type === "warning") problem(event);
  else if (event.type === "ended" && wanted) note("live-note", () => say("ended", { why: event.message }));
}

async function stop() {
  const ended = session;
  wanted = false;
  session = null;
  silence();
  const left = player?.close();
  audio?.close();
  player = audio = null;
  showStage();
  await left;
  if (ended) await call("DELETE", `/v1/sessions/${ended.session_id}`).catch(() => {});
}

const live = async () => session || (await start(), session);

async function speak() {
  if (microphone) return silence(true);
  if (!(await live())) return;
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true, noiseSuppression: true, channelCount: 1 } });
    const context = new AudioContext({ sampleRate: 16000 });
    await context.audioWorklet.addModule("/page/microphone.js");
    const pieces = new AudioWorkletNode(context, "pieces");
    pieces.port.onmessage = ({ data }) => {
      if (audio?.readyState === WebSocket.OPEN) audio.send(data.pcm);
      $("level").value = data.peak;
    };
    context.createMediaStreamSource(stream).connect(pieces);
    audio.send(JSON.stringify({ type: "config", sample_rate: context.sampleRate, realtime: true }));
    microphone = { stream, context };
    video.muted = true; // it must not hear itself
  } catch (error) {
    problem({ message: `${say("micDenied")}: ${error.message}`, hint: say("micHint") });
  }
  showMicrophone();
}

function silence(said = false) {
  microphone?.stream.getTracks().forEach((track) => track.stop());
  microphone?.context.close();
  if (microphone) video.muted = false;
  if (said && audio?.readyState === WebSocket.OPEN) audio.send(JSON.stringify({ type: "speak_end" }));
  microphone = null;
  showMicrophone();
}

function showMicrophone() {
  $("microphone").setAttribute("aria-pressed", Boolean(microphone));
  $("level").toggleAttribute("data-on", Boolean(microphone));
  $("level").value = 0;
}

async function sayFile(file) {
  if (!file || !(await live())) return;
  audio.send(JSON.stringify({ type: "config", realtime: false }));
  video.muted = false;
  note("live-note", () => say("saying", { name: file.name }));
  try {
    await call("POST", session.addresses.speech, file, file.type.startsWith("audio/") ? file.type : "application/octet-stream");
  } catch (error) {
    problem(error, file.name);
  }
}

function interrupt() {
  if (audio?.readyState === WebSocket.OPEN) audio.send(JSON.stringify({ type: "interrupt" }));
  silence();
}

export function startStage() {
  onFaces(showStage);
  $("connect").onclick = () => (session ? stop() : start());
  $("microphone").onclick = speak;
  $("interrupt").onclick = interrupt;
  $("speak-file").onclick = () => $("speech-file").click();
  $("speech-file").onchange = ({ target }) => { sayFile(target.files[0]); target.value = ""; };
  $("live-template").onchange = ({ target }) => { choose(target.value); if (session) stop().then(start); };
  $("watch").onchange = ({ target }) => { localStorage.setItem("watch", target.value); if (session) watch(); };
  offerWebrtc().catch(() => {});
  $("sound").onclick = () => { video.muted = false; $("sound").hidden = true; };
  video.onplaying = () => {
    if (session && $("screen").dataset.state === "wait") show("idle");
    $("sound").hidden = !video.muted || Boolean(microphone);
  };
  setInterval(() => audio?.readyState === WebSocket.OPEN && audio.send('{"type":"keep_alive"}'), 60000);
  addEventListener("pagehide", () => session && fetch(`/v1/sessions/${session.session_id}`, { method: "DELETE", keepalive: true }));
}
