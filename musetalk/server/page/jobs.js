// Renderings: asked for, watched while they play, and shown with a contact sheet and their times.

import { call, form, withToken } from "./calls.js";
import { $, choose, faces, fillSelect, make, note, onFaces, problem } from "./common.js";
import { drawSheet } from "./sheet.js";
import { say } from "./words.js";

const SHOWN = 6;
const FINAL = ["completed", "failed", "cancelled"];
const names = {}; // of the speech files, by job
const boxes = new Map();
let speech = null;

function takeSpeech(file) {
  speech = file;
  $("choose-audio").textContent = file ? file.name.slice(0, 24) : say("chooseSpeech");
  showForm();
}

function showForm() {
  fillSelect($("render-template"));
  $("start-render").disabled = !speech || !faces.chosen;
  if (!faces.chosen) note("render-note", say("needFace"));
  else if (speech) note("render-note", say("renderReady", { face: faces.chosen, name: speech.name }));
  else note("render-note", say("renderHint"));
}

async function ask(event) {
  event.preventDefault();
  $("start-render").disabled = true;
  try {
    const fields = { audio: speech, template_id: $("render-template").value, fps: $("fps").value };
    const job = await call("POST", "/v1/videos", form(fields));
    names[job.id] = speech.name;
    show(job);
  } catch (error) {
    problem(error, speech.name);
  } finally {
    showForm();
  }
}

function watch(job, box) {
  box.events = new EventSource(withToken(job.events_url));
  const told = ({ data }) => show(JSON.parse(data));
  for (const status of ["queued", "in_progress", ...FINAL]) box.events.addEventListener(status, told);
}

function newBox(job) {
  const box = { status: "", job, element: make("article", { className: "job" }) };
  box.tag = make("span", { className: "tag" });
  box.bar = make("progress", { max: 100, ariaLabel: job.template_id });
  box.actions = make("span", { className: "row" });
  box.body = make("div", { className: "job-body" });
  box.facts = make("div", { className: "facts" });
  box.title = make("b");
  box.element.append(make("div", { className: "job-head" }, box.title, box.tag, box.actions), box.body);
  boxes.set(job.id, box);
  $("jobs").prepend(box.element);
  [...boxes.keys()].slice(0, -SHOWN).forEach(drop);
  return box;
}

function drop(id) {
  boxes.get(id)?.events?.close();
  boxes.get(id)?.element.remove();
  boxes.delete(id);
}

function show(job) {
  const box = boxes.get(job.id) || newBox(job);
  box.job = job;
  showWords(box, job);
  box.bar.value = job.progress;
  if (box.status === job.status) return;
  box.status = job.status;
  showActions(box, job);
  if (job.status === "in_progress") showPlaying(box, job);
  if (job.status === "completed") showResult(box, job);
  if (job.status === "failed") showFailure(box, job);
  if (job.status === "cancelled") box.body.replaceChildren();
  if (FINAL.includes(job.status)) box.events?.close();
  else if (!box.events) watch(job, box);
}

function showWords(box, job) {
  box.title.textContent = [job.template_id, names[job.id]].filter(Boolean).join(` ${say("speechTo")} `);
  box.tag.className = `tag ${job.status}`;
  box.tag.textContent = job.status === "in_progress" ? `${say(job.status)} ${job.progress} %` : say(job.status);
  if (job.status === "completed") showFacts(box, job);
}

function showActions(box, job) {
  const ended = FINAL.includes(job.status);
  const remove = make("button", { type: "button", className: "quiet danger", textContent: say(ended ? "remove" : "cancel") });
  remove.onclick = () => call("DELETE", `/v1/videos/${job.id}`).then((answer) => (answer.deleted ? drop(job.id) : show(answer)), problem);
  const save = job.status === "completed" ? make("a", { className: "button", href: withToken(job.content_url), download: `${job.template_id}.mp4`, textContent: say("download") }) : null;
  box.actions.replaceChildren(...[save, remove].filter(Boolean));
}

function player(job, autoplay) {
  return make("video", { src: withToken(job.content_url), controls: true, playsInline: true, autoplay, ariaLabel: job.template_id });
}

function showPlaying(box, job) {
  box.body.className = "job-body with-video";
  box.body.replaceChildren(player(job, true), box.bar);
}

function fact(key, value) {
  return make("span", {}, make("b", { textContent: value }), ` ${say(key)}`);
}

function showFacts(box, job) {
  const took = job.completed_at - job.created_at;
  const values = [fact("lengthFact", say("seconds", { n: job.seconds })), fact("framesFact", job.frames), fact("tookFact", say("seconds", { n: took.toFixed(2) })),
    fact("speedFact", `${(job.seconds / took).toFixed(1)} ×`), make("span", { textContent: [job.size, job.engine].filter(Boolean).join(" · ") })];
  box.facts.replaceChildren(...values);
}

function showResult(box, job) {
  const sheet = make("canvas", { className: "sheet", role: "img", ariaLabel: say("sheet") });
  const playing = box.body.querySelector("video");
  box.body.className = "job-body with-video";
  box.body.replaceChildren(playing || player(job, false), make("div", {}, sheet, box.facts));
  const face = faces.all.find(({ id }) => id === job.template_id);
  drawSheet(sheet, withToken(job.content_url), face?.bbox).catch(() => sheet.remove());
  const settle = () => { playing.src = withToken(job.content_url); };
  if (playing?.ended || playing?.paused) settle();
  else playing?.addEventListener("ended", settle, { once: true }); // the file has ranges, the stream had none
}

function showFailure(box, job) {
  const error = job.error || { message: say("failed") };
  box.body.className = "job-body";
  box.body.replaceChildren(make("p", { className: "note bad", textContent: `${error.message} ${error.hint || ""}` }));
  if (names[job.id]) problem(error, job.template_id);
}

export function showJobs() {
  showForm();
  for (const box of boxes.values()) {
    showWords(box, box.job);
    showActions(box, box.job);
  }
  if (!speech) $("choose-audio").textContent = say("chooseSpeech");
}

export async function loadJobs() {
  const { data } = await call("GET", `/v1/videos?limit=${SHOWN}`);
  data.reverse().forEach(show);
}

export function startJobs() {
  onFaces(showForm);
  $("choose-audio").onclick = () => $("render-file").click();
  $("render-file").onchange = ({ target }) => takeSpeech(target.files[0] || null);
  $("render-template").onchange = ({ target }) => choose(target.value);
  $("render-form").addEventListener("submit", ask);
}
