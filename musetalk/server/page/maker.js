// A new face: a picture, a preview that follows the settings, and the template.

import { call, form } from "./calls.js";
import { $, DRAFT, choose, loadFaces, make, note, onFaces, faces, previewUrl, problem } from "./common.js";
import { say } from "./words.js";

const PAUSE = 350; // ms without a change before the preview is drawn again
let picture = null;
let version = 0;
let timer = 0;

const settings = () => ({
  bbox_shift: $("shift").value,
  parsing_mode: document.querySelector("input[name=mode]:checked").value,
  idle_motion: $("idle").checked,
});

function take(file) {
  if (!file) return;
  picture = file;
  if (!$("name").value) $("name").value = file.name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N} ()[\]._-]/gu, "_").replace(/^\.+/, "").slice(0, 80);
  $("drop-hint").hidden = true;
  $("preview").hidden = false;
  $("preview").alt = say("preview", { name: file.name });
  if (!file.type.startsWith("video/")) $("preview").src = URL.createObjectURL(file);
  $("make").disabled = false;
  draw();
}

function drawSoon() {
  $("shift-value").textContent = $("shift").value;
  clearTimeout(timer);
  if (picture) timer = setTimeout(draw, PAUSE);
}

async function draw() {
  const mine = ++version;
  $("preview-busy").hidden = false;
  note("make-note", () => say("looking"));
  try {
    await call("POST", "/v1/templates", form({ file: picture, template_id: DRAFT, ...settings() }));
    if (mine !== version) return;
    $("preview").src = previewUrl(DRAFT, `${Date.now()}`);
    $("legend").hidden = false;
    note("make-note", "");
  } catch (error) {
    if (mine === version) note("make-note", `${error.message} ${error.hint}`, "bad");
  } finally {
    if (mine === version) $("preview-busy").hidden = true;
  }
}

async function finish(event) {
  event.preventDefault();
  const name = $("name").value.trim();
  if (!picture) return $("picture-file").click();
  if (!name) return note("make-note", () => say("nameNeeded"), "bad");
  $("make").disabled = true;
  $("make-progress").hidden = false;
  note("make-note", () => say("making"));
  try {
    await call("POST", "/v1/templates", form({ file: picture, template_id: name, ...settings() }));
    choose(name);
    await loadFaces();
    note("make-note", () => say("made", { name }), "good");
    call("DELETE", `/v1/templates/${DRAFT}`).catch(() => {});
  } catch (error) {
    note("make-note", `${error.message} ${error.hint}`, "bad");
    problem(error, name);
  } finally {
    $("make").disabled = false;
    $("make-progress").hidden = true;
  }
}

async function takeExample() {
  $("name").value = "example";
  const answer = await fetch("/page/example.jpg");
  take(new File([await answer.blob()], "example.jpg", { type: "image/jpeg" }));
  $("settings").requestSubmit();
}

async function remove(id) {
  if (!confirm(say("sure", { name: id }))) return;
  await call("DELETE", `/v1/templates/${encodeURIComponent(id)}`).catch(problem);
  await loadFaces().catch(problem);
}

function again(face) {
  $("name").value = face.id;
  $("shift").value = face.bbox_shift ?? 0;
  $("shift-value").textContent = $("shift").value;
  const mode = document.querySelector(`input[name=mode][value="${face.parsing_mode}"]`);
  if (mode) mode.checked = true;
  $("idle").checked = Boolean(face.parameters?.idle_motion);
  note("make-note", () => say("againHint", { name: face.id }));
  $("maker").scrollIntoView({ block: "start" });
  $("picture-file").click();
}

function tile(face) {
  const [width, height] = face.frame_size || [];
  const size = [width && `${width}×${height}`, face.frame_count > 2 ? say("frames", { n: face.frame_count }) : say("image"), face.engine].filter(Boolean);
  const bytes = say("sizeMb", { n: (face.bytes / 1048576).toFixed(1) });
  const button = (key, act, kind) => make("button", { type: "button", className: `quiet ${kind}`, textContent: say(key), onclick: act, ariaLabel: `${say(key)}: ${face.id}` });
  return make("li", { className: "tile", ariaCurrent: String(face.id === faces.chosen) },
    make("button", { type: "button", className: "face", disabled: !face.valid, onclick: () => choose(face.id), ariaLabel: `${say("use")}: ${face.id}` },
      make("img", { src: previewUrl(face.id, face.processed_at), alt: "", loading: "lazy" })),
    make("div", { className: "words" }, make("b", { textContent: face.id, title: face.id }),
      make("small", { textContent: face.valid ? size.join(" · ") : `${say("damaged")}: ${face.message}` }), make("small", { textContent: bytes })),
    make("div", { className: "row" }, button("again", () => again(face), ""), button("remove", () => remove(face.id), "danger")));
}

function showTiles() {
  $("template-list").replaceChildren(...faces.all.map(tile));
  $("no-templates").hidden = faces.all.length > 0;
}

export function startMaker() {
  onFaces(showTiles);
  const pick = () => $("picture-file").click();
  $("begin").onclick = $("drop").onclick = pick;
  $("drop").onkeydown = (event) => { if (["Enter", " "].includes(event.key)) { event.preventDefault(); pick(); } };
  $("picture-file").onchange = ({ target }) => { take(target.files[0]); target.value = ""; };
  for (const area of [$("drop"), $("screen")]) {
    area.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
    area.addEventListener("dragleave", () => $("drop").classList.remove("over"));
    area.addEventListener("drop", (event) => { event.preventDefault(); $("drop").classList.remove("over"); take(event.dataTransfer.files[0]); });
  }
  $("settings").addEventListener("input", (event) => { if (event.target.id !== "name") drawSoon(); });
  $("settings").addEventListener("submit", finish);
  $("example").onclick = () => takeExample().catch(problem);
  $("refresh").onclick = () => loadFaces().catch(problem);
}
