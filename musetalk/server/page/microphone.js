// Microphone → 20 ms pieces of s16le; runs in the browser's sound thread.

class Pieces extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Int16Array(Math.round(sampleRate / 50));
    this.filled = 0;
    this.peak = 0;
  }

  process([[samples]]) {
    for (const sample of samples ?? []) {
      this.peak = Math.max(this.peak, Math.abs(sample));
      this.piece[this.filled++] = Math.max(-1, Math.min(1, sample)) * 32767;
      if (this.filled === this.piece.length) {
        this.port.postMessage({ pcm: this.piece.slice().buffer, peak: this.peak });
        this.filled = this.peak = 0;
      }
    }
    return true;
  }
}

registerProcessor("pieces", Pieces);
