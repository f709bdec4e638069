// What the worker is doing: sessions, queue, answer times and stages as small charts.

import { call } from "./calls.js";
import { $, make, problem } from "./common.js";
import { say } from "./words.js";

const EVERY = 2000; // ms
const POINTS = 60;
const series = { sessions: [], queue: [], answer: [] };
let reachable = true;

function draw(id, values, limit) {
  const top = Math.max(limit || 0, ...values, 1) * 1.1;
  const x = (i) => (240 * (i + POINTS - values.length)) / (POINTS - 1), y = (value) => 54 - (50 * value) / top;
  const line = values.map((value, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const area = values.length ? `${line}L240 56L${x(0).toFixed(1)} 56Z` : "";
  const cap = limit ? `<line x1="0" x2="240" y1="${y(limit)}" y2="${y(limit)}"/>` : "";
  $(id).innerHTML = `${cap}<path class="area" d="${area}"/><path d="${line}"/>`;
  $(id).setAttribute("aria-label", `${values.at(-1) ?? 0}`);
}

function push(name, value) {
  series[name].push(value);
  if (series[name].length > POINTS) series[name].shift();
}

function showHealth(state, words, short) {
  $("health").dataset.state = state;
  $("health-text").replaceChildren(make("span", { className: "long", textContent: words }), make("span", { className: "short", textContent: short, ariaHidden: "true" }));
}

function stagesOf(metrics) {
  const found = metrics.matchAll(/^\w+_stage_seconds_sum\{stage="(\w+)"\} ([\d.e+-]+)$/gm);
  return [...found].map(([, stage, seconds]) => [stage, Number(seconds)]);
}

function showStages(stages) {
  const total = stages.reduce((sum, [, seconds]) => sum + seconds, 0);
  $("stage-total").textContent = total ? say("seconds", { n: total.toFixed(1) }) : "";
  const rows = stages.map(([stage, seconds]) => {
    const bar = make("i");
    bar.style.width = `${(100 * seconds) / Math.max(...stages.map(([, most]) => most))}%`;
    return make("div", {}, stage, bar, make("b", { textContent: `${Math.round((100 * seconds) / total)} %` }));
  });
  $("stages").replaceChildren(...(total ? rows : [say("noStages")]));
}

function sessionRow(session) {
  const end = make("button", { type: "button", className: "quiet danger", textContent: say("end"), ariaLabel: `${say("end")}: ${session.session_id}` });
  end.onclick = () => call("DELETE", `/v1/sessions/${session.session_id}`).catch(problem);
  const cells = [session.template_id, say(session.state), `${session.width}×${session.height} · ${session.fps}/s`, say("seconds", { n: Math.round(session.seconds) }),
    say("viewers", { n: session.viewers }), say("msFrame", { n: Object.values(session.frame_ms).reduce((sum, ms) => sum + ms, 0).toFixed(1) }),
    session.waiting_seconds ? say("waitingSpeech", { n: session.waiting_seconds }) : ""];
  return make("tr", {}, ...cells.map((textContent) => make("td", { textContent })), make("td", {}, end));
}

async function look() {
  const began = performance.now();
  const status = await call("GET", "/api/status");
  push("answer", Math.round(performance.now() - began));
  push("sessions", status.active_sessions);
  push("queue", status.queued + status.queue_depth);
  const fits = { n: status.active_sessions, m: status.capacity };
  const full = status.active_sessions >= status.capacity;
  showHealth(status.status === "draining" ? "bad" : full ? "full" : "good", status.status === "draining" ? say("draining") : `${say("ready")} · ${say("fits", fits)}`, `${fits.n}/${fits.m}`);
  $("sessions-now").textContent = `${fits.n} / ${fits.m}`;
  $("queue-now").textContent = series.queue.at(-1);
  $("answer-now").textContent = say("ms", { n: series.answer.at(-1) });
  $("version").textContent = `Enhanced MuseTalk ${status.version}`;
  draw("chart-sessions", series.sessions, status.capacity);
  draw("chart-queue", series.queue);
  draw("chart-answer", series.answer);
  const { sessions } = await call("GET", "/v1/sessions");
  $("sessions").tBodies[0].replaceChildren(...sessions.map(sessionRow));
  showStages(stagesOf(await call("GET", "/metrics").catch(() => "")));
}

async function lookAgain() {
  try {
    if (!document.hidden) await look();
    reachable = true;
  } catch (error) {
    showHealth("bad", say("gone"), "!");
    if (reachable) problem(error);
    reachable = false;
  }
  setTimeout(lookAgain, EVERY);
}

export const startWorker = lookAgain;
export const showWorker = () => look().catch(() => {});
