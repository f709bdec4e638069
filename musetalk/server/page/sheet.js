// A contact sheet of a finished video, drawn in the browser: evenly spaced frames over the sound's shape.

const COLUMNS = 4;
const SHOWN = 2 * COLUMNS;
const SIDE = 200; // pixels of a frame
const WAVE = 72;
const AROUND = 1.5; // times the face's box

const once = (element, name) => new Promise((resolve, reject) => {
  element.addEventListener(name, resolve, { once: true });
  element.addEventListener("error", () => reject(new Error("the video can't be read")), { once: true });
});

function part(video, bbox) {
  const [width, height] = [video.videoWidth, video.videoHeight];
  const [x1, y1, x2, y2] = bbox || [0, 0, width, height];
  const side = Math.min(width, height, bbox ? AROUND * Math.max(x2 - x1, y2 - y1) : Infinity);
  const inside = (middle, room) => Math.max(0, Math.min(room - side, middle - side / 2));
  return [inside((x1 + x2) / 2, width), inside((y1 + y2) / 2, height), side, side];
}

export async function drawSheet(canvas, url, bbox) {
  const content = await (await fetch(url)).blob();
  const video = document.createElement("video");
  video.muted = true;
  const address = URL.createObjectURL(content);
  video.src = address;
  await once(video, "loadeddata");
  canvas.width = COLUMNS * SIDE;
  canvas.height = 2 * SIDE + WAVE;
  const pen = canvas.getContext("2d");
  const shown = part(video, bbox);
  for (let i = 0; i < SHOWN; i++) {
    video.currentTime = ((i + 0.5) / SHOWN) * video.duration;
    await once(video, "seeked");
    pen.drawImage(video, ...shown, (i % COLUMNS) * SIDE + 2, Math.floor(i / COLUMNS) * SIDE, SIDE - 4, SIDE - 4);
  }
  video.removeAttribute("src");
  video.load();
  URL.revokeObjectURL(address);
  await drawWave(pen, content, canvas);
}

async function drawWave(pen, content, canvas) {
  const sound = await new OfflineAudioContext(1, 1, 16000).decodeAudioData(await content.arrayBuffer());
  const samples = sound.getChannelData(0), step = samples.length / canvas.width;
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  for (let x = 0; x < canvas.width; x++) {
    let peak = 0;
    for (let i = Math.floor(x * step); i < (x + 1) * step; i += 4) peak = Math.max(peak, Math.abs(samples[i] || 0));
    const height = Math.max(1, peak * (WAVE - 8));
    pen.fillRect(x, 2 * SIDE + (WAVE - height) / 2, 1, height);
  }
}
