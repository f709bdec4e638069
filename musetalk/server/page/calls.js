// Calls of the worker: errors become exceptions with what to do, and the token goes wherever it is asked for.

import { say } from "./words.js";

let token = new URLSearchParams(location.search).get("token") || sessionStorage.getItem("token") || "";

export class CallError extends Error {
  constructor(status, body) {
    super(body.message || body.detail || `HTTP ${status}`);
    this.status = status;
    this.hint = body.hint || "";
  }
}

export const withToken = (path) => (token ? `${path}${path.includes("?") ? "&" : "?"}token=${encodeURIComponent(token)}` : path);

export const socketUrl = (path) => withToken(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${path}`);

export const call = async (...given) => (await callWhole(...given)).content;

export async function callWhole(method, path, body, type) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (type) headers["Content-Type"] = type;
  let answer;
  try {
    answer = await fetch(path, { method, body, headers });
  } catch {
    throw new CallError(0, { message: say("unreachable"), hint: say("unreachableHint") });
  }
  if (answer.status === 401) {
    token = prompt(say("askToken")) || "";
    sessionStorage.setItem("token", token);
    if (token) return callWhole(method, path, body, type);
  }
  const content = answer.headers.get("content-type")?.includes("json") ? await answer.json() : await answer.text();
  if (!answer.ok) throw new CallError(answer.status, content);
  return { content, headers: answer.headers };
}

export const send = (path, body) => call("POST", path, JSON.stringify(body), "application/json");

export function form(fields) {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) data.append(name, value);
  return data;
}
