// The server: questions, answers that come in pieces, its key, and what went wrong in one sentence.

import { $ } from "./dom.js";

let key = "";
try { key = sessionStorage.getItem("moemamba-key") ?? ""; } catch { /* the browser keeps nothing */ }

export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Show what went wrong; what the reader has stopped is not wrong. */
export function complain(error) {
  if (error?.name === "AbortError") return;
  const text = (error instanceof Problem ? error.message : `the page has a fault (${error})`).trim();
  $("problem").firstElementChild.textContent = text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
  $("problem").hidden = false;
  if (!(error instanceof Problem)) console.error(error);
}

export const content = () => { $("problem").hidden = true; };

/** Run something that the reader has asked for: what was wrong before is forgotten, what goes wrong is shown. */
export async function attempt(work) {
  content();
  try {
    return await work();
  } catch (error) {
    complain(error);
  }
}

let asking = null;

/** Ask for the key, once for all who wait; false if there is none. */
function unlock() {
  asking ??= new Promise((settle) => {
    const dialog = $("locked");
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      if (dialog.returnValue === "ok") {
        key = $("key").value.trim();
        try { sessionStorage.setItem("moemamba-key", key); } catch { /* for this page alone, then */ }
      }
      $("key").value = "";
      settle(dialog.returnValue === "ok");
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/** An answer of the server; raises Problem. The body is JSON, or a file as it stands. */
export async function ask(method, path, body, signal) {
  const file = body instanceof Blob;
  const headers = { ...(key && { authorization: `Bearer ${key}` }) };
  if (body !== undefined) headers["content-type"] = file ? "application/octet-stream" : "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: file || body === undefined ? body : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("the server does not answer; look whether it still runs");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  if (answer.status === 401 && (await unlock())) return ask(method, path, body, signal);
  throw new Problem(said.error?.message ?? `the server answered with status ${answer.status}`, answer.status);
}

export const get = async (path) => (await ask("GET", path)).json();
export const post = async (path, body, signal) => (await ask("POST", path, body, signal)).json();

/** The objects of a stream as they come; raises Problem, also for an error on the way. */
export async function* stream(path, body, signal) {
  const answer = await ask("POST", path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Problem("the connection was lost; try again");
    });
    if (done) throw new Problem("the answer broke off; try again");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      if (!event.startsWith("data: ")) continue;
      const said = JSON.parse(event.slice(6));
      if (said.error) throw new Problem(said.error.message);
      yield said;
    }
  }
}
