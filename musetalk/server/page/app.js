// Brings the page to life: language, theme, and its four parts.

import { $, loadFaces, problem, showFaces, showNotes, showProblems } from "./common.js";
import { loadJobs, showJobs, startJobs } from "./jobs.js";
import { startStage } from "./live.js";
import { startMaker } from "./maker.js";
import { showWorker, startWorker } from "./worker.js";
import { isChinese, switchLanguage, translate } from "./words.js";

function showLanguage() {
  $("language").textContent = isChinese() ? "English" : "中文";
}

function switchTheme() {
  const root = document.documentElement;
  const dark = getComputedStyle(root).colorScheme === "dark" || (root.dataset.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
}

document.documentElement.dataset.theme = localStorage.getItem("theme") || "auto";
translate();
showLanguage();
$("theme").onclick = switchTheme;
$("language").onclick = () => {
  switchLanguage();
  showLanguage();
  showNotes();
  showFaces();
  showJobs();
  showWorker();
};
startStage();
startMaker();
startJobs();
showProblems();
showFaces();
loadFaces().then(loadJobs).catch(problem); // contact sheets are cut round the faces
startWorker();
