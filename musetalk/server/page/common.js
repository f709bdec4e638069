// What all parts of the page share: elements, messages, what went wrong, the faces there are.

import { call, withToken } from "./calls.js";
import { say } from "./words.js";

export const DRAFT = "preview-draft"; // the template that the preview is drawn of
const KEPT_PROBLEMS = 8;

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const notes = new Map(); // what each note says; a function says it in the language of the moment

export function note(id, words, kind = "") {
  notes.set(id, [words, kind]);
  $(id).textContent = typeof words === "function" ? words() : words;
  $(id).className = `note ${kind}`;
}

export function showNotes() {
  for (const [id, [words, kind]] of notes) note(id, words, kind);
}

export function toast(words, hint = "") {
  const box = make("div", { className: "toast" }, words, make("small", { textContent: hint }));
  $("toasts").append(box);
  setTimeout(() => box.remove(), 7000);
}

const problems = [];

export function problem(error, where = "") {
  const time = new Date().toLocaleTimeString();
  problems.unshift({ time, words: [where, error.message].filter(Boolean).join(": "), hint: error.hint || "" });
  problems.splice(KEPT_PROBLEMS);
  toast(problems[0].words, problems[0].hint);
  showProblems();
}

export function showProblems() {
  $("no-problems").hidden = problems.length > 0;
  $("problems").replaceChildren(...problems.map(({ time, words, hint }) =>
    make("li", {}, `${time} · ${words}`, make("small", { textContent: hint }))));
}

export const faces = { all: [], chosen: localStorage.getItem("face") || "" };
const watchers = [];

export const onFaces = (watcher) => watchers.push(watcher);

export async function loadFaces() {
  const { data } = await call("GET", "/v1/templates");
  faces.all = data.filter(({ id }) => id !== DRAFT && !id.startsWith("portrait-"));
  faces.all.sort((a, b) => (b.processed_at || 0) - (a.processed_at || 0));
  const usable = faces.all.filter(({ valid }) => valid);
  if (!usable.some(({ id }) => id === faces.chosen)) faces.chosen = usable[0]?.id || "";
  showFaces();
}

export function choose(id) {
  faces.chosen = id;
  localStorage.setItem("face", id);
  showFaces();
}

export const showFaces = () => watchers.forEach((watcher) => watcher());

export const previewUrl = (id, version) => withToken(`/v1/templates/${encodeURIComponent(id)}/preview?v=${version}`);

export const pictureUrl = (id, version) => withToken(`/v1/templates/${encodeURIComponent(id)}/picture?v=${version}`);

export function fillSelect(select) {
  const usable = faces.all.filter(({ valid }) => valid);
  const options = usable.map(({ id }) => make("option", { value: id, textContent: id }));
  if (!options.length) options.push(make("option", { value: "", textContent: say("noFaceYet") }));
  select.replaceChildren(...options);
  select.value = faces.chosen;
  select.disabled = !usable.length;
}
