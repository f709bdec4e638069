// Plays a session: its fragmented mp4 at the live edge, where what falls behind is skipped and what was seen is
// dropped, or WebRTC by WHEP. Both are a player that can be closed, and tell when they have lost it.

import { callWhole, socketUrl } from "./calls.js";

const TARGET = 0.15; // seconds behind the newest picture
const TOO_FAR = 0.7; // seconds behind it after which it jumps
const KEPT = 8; // seconds that were seen and stay in the buffer
const OVER = [4404, 4410]; // close codes after which nobody tries again

export class LivePlayer {
  constructor(video, path, onLost) {
    this.video = video;
    this.path = path;
    this.onLost = onLost;
    this.closed = false;
    this.tries = 0;
    this.open();
    this.timer = setInterval(() => this.keepUp(), 100);
  }

  open() {
    this.waiting = [];
    this.buffer = null;
    this.socket = new WebSocket(socketUrl(this.path));
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? this.heed(JSON.parse(data)) : this.take(data));
    this.socket.onclose = ({ code }) => this.lost(code);
  }

  heed(message) {
    if (message.type !== "ready") return;
    const source = new MediaSource();
    URL.revokeObjectURL(this.video.src);
    this.video.src = URL.createObjectURL(source);
    source.addEventListener("sourceopen", () => {
      this.buffer = source.addSourceBuffer(message.mime);
      this.buffer.addEventListener("updateend", () => this.append());
      this.append();
    }, { once: true });
    this.tries = 0;
  }

  take(content) {
    this.waiting.push(content);
    this.append();
  }

  append() {
    if (!this.buffer || this.buffer.updating) return;
    try {
      if (this.waiting.length) this.buffer.appendBuffer(this.waiting.shift());
      else if (this.start() < this.video.currentTime - 2 * KEPT) this.buffer.remove(0, this.video.currentTime - KEPT);
    } catch {
      this.socket.close(); // the buffer is full or broken: begin anew
    }
  }

  start() {
    const { buffered } = this.video;
    return buffered.length ? buffered.start(0) : Infinity;
  }

  keepUp() {
    const { buffered } = this.video;
    if (!buffered.length || this.video.seeking) return; // a jump that is interrupted shows nothing
    const first = buffered.start(buffered.length - 1), edge = buffered.end(buffered.length - 1);
    const behind = edge - this.video.currentTime;
    if (behind > TOO_FAR || this.video.currentTime < first) this.toEdge();
    this.video.playbackRate = behind > 2 * TARGET ? 1.1 : 1;
    if (this.video.paused && !document.hidden) this.video.play().catch(() => {});
  }

  toEdge() {
    const { buffered } = this.video;
    if (!buffered.length) return;
    const last = buffered.length - 1;
    this.video.currentTime = Math.max(buffered.start(last), buffered.end(last) - TARGET);
  }

  lost(code) {
    if (this.closed) return;
    const final = OVER.includes(code);
    this.onLost(final);
    if (!final) setTimeout(() => this.closed || this.open(), Math.min(5000, 300 * 2 ** this.tries++));
  }

  close() {
    this.closed = true;
    clearInterval(this.timer);
    this.socket.close();
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.load();
  }
}

const GATHERING = 500; // ms for a browser's own addresses; those of this machine are there at once

export class WhepPlayer {
  constructor(video, path, onLost) {
    this.video = video;
    this.path = path;
    this.onLost = onLost;
    this.closed = false;
    this.tries = 0;
    this.attempt();
  }

  attempt() {
    this.open().catch((error) => (error.status === 404 ? this.onLost(true) : this.lost()));
  }

  async open() {
    const peer = new RTCPeerConnection();
    const seen = new MediaStream();
    this.peer = peer;
    this.where = null;
    peer.ontrack = ({ track }) => { seen.addTrack(track); this.play(seen); };
    peer.onconnectionstatechange = () => {
      if (peer.connectionState === "connected") this.tries = 0;
      if (["failed", "disconnected", "closed"].includes(peer.connectionState)) this.lost();
    };
    for (const kind of ["video", "audio"]) peer.addTransceiver(kind, { direction: "recvonly" });
    await peer.setLocalDescription(await peer.createOffer());
    await this.gathered(peer);
    const { content, headers } = await callWhole("POST", this.path, peer.localDescription.sdp, "application/sdp");
    this.where = headers.get("location");
    if (this.closed) return this.hangUp();
    await peer.setRemoteDescription({ type: "answer", sdp: content });
  }

  gathered(peer) {
    return new Promise((done) => {
      peer.onicegatheringstatechange = () => peer.iceGatheringState === "complete" && done();
      setTimeout(done, GATHERING);
    });
  }

  play(seen) {
    if (this.video.srcObject !== seen) this.video.srcObject = seen;
    this.video.play().catch(() => {});
  }

  toEdge() {} // it is always there

  lost() {
    if (this.closed || this.waiting) return;
    this.hangUp();
    this.onLost(false);
    this.waiting = setTimeout(() => {
      this.waiting = 0;
      if (!this.closed) this.attempt();
    }, Math.min(5000, 300 * 2 ** this.tries++));
  }

  async hangUp() {
    const { peer, where } = this;
    this.where = null;
    peer.onconnectionstatechange = null;
    if (where) await callWhole("DELETE", where).catch(() => {}); // first: the worker forgets who is gone
    peer.close();
  }

  close() {
    this.closed = true;
    clearTimeout(this.waiting);
    this.video.srcObject = null;
    return this.hangUp();
  }
}
