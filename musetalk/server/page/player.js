// Plays a session's fragmented mp4 at its live edge: what falls behind is skipped, what was seen is dropped.

import { socketUrl } from "./calls.js";

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
    if (!buffered.length) return;
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
