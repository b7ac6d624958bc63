// Tokens on the page: their text, how likely the model found each, and what else it had in mind.

import { $, h, percent, shown } from "./dom.js";

const kept = new WeakMap(); // of an element: its token

/** The tokens of a piece of a completion, of which so many characters came before. */
export function ofCompletion(text, scores, before) {
  if (!scores?.tokens.length) return text ? [{ text }] : [];
  const letters = [...text]; // offsets count characters, of which JavaScript's strings may have two units
  const starts = scores.text_offset.map((at) => Math.min(Math.max(at - before, 0), letters.length));
  const found = starts[0] > 0 ? [{ text: letters.slice(0, starts[0]).join("") }] : [];
  scores.tokens.forEach((name, i) => {
    const end = starts[i + 1] ?? letters.length;
    const top = Object.entries(scores.top_logprobs[i] ?? {}).map(([each, value]) => [each, Math.exp(value)]);
    found.push({ text: letters.slice(starts[i], end).join(""), name, p: Math.exp(scores.token_logprobs[i]), top });
  });
  return found;
}

/** The same of a piece of an answer in a conversation, whose tokens have bytes. */
export function ofAnswer(text, scores, decoder) {
  const found = (scores?.content ?? []).map((each) => ({
    text: decoder.decode(new Uint8Array(each.bytes), { stream: true }),
    name: each.token,
    p: Math.exp(each.logprob),
    top: each.top_logprobs.map((other) => [other.token, Math.exp(other.logprob)]),
  }));
  const whole = found.map((each) => each.text).join("") === text;
  return whole ? found : text ? [{ text }] : []; // a stop may have cut the text within a token
}

/** Add tokens to an element; those that spell one character together are shown as one. */
export function append(box, tokens) {
  let held = null;
  for (let token of tokens) {
    if (held) token = { ...token, name: held.name + token.name, p: held.p * token.p };
    held = token.text ? null : token;
    if (held) continue;
    const span = h("span", { className: "token", textContent: token.text });
    span.style.setProperty("--doubt", Math.min(1, -Math.log10(token.p ?? 1) / 4));
    kept.set(span, token);
    box.append(span);
  }
}

const row = ([name, p], chosen) => h("tr", { className: name === chosen ? "chosen" : "" },
  h("td", {}, shown(name)), h("td", {}, bar(p)), h("td", {}, percent(p)));

export function bar(value) {
  const made = h("i", { className: "bar" });
  made.style.setProperty("--part", Math.min(1, value));
  return made;
}

let at = null;

/** Show what is known of a token beside it; nothing if there is none. */
export function peek(span) {
  at?.classList.remove("at");
  const token = span && kept.get(span);
  at = token?.top ? span : null;
  const box = $("peek");
  box.hidden = !at;
  if (!at) return;
  at.classList.add("at");
  const top = [...token.top].sort((a, b) => b[1] - a[1]);
  box.replaceChildren(h("p", {}, h("b", {}, shown(token.name)), ` had ${percent(token.p)}`),
    h("table", {}, h("tbody", {}, ...top.map((each) => row(each, token.name)))));
  const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.min(Math.max(place.left, 12), document.documentElement.clientWidth - box.offsetWidth - 12);
  const below = place.bottom + 8 + box.offsetHeight < innerHeight || place.top < box.offsetHeight + 16;
  box.style.left = `${left + scrollX}px`;
  box.style.top = `${(below ? place.bottom + 8 : place.top - box.offsetHeight - 8) + scrollY}px`;
}

/** Tokens of an element answer to pointers and to arrow keys. */
export function inspect(box) {
  box.addEventListener("pointerover", (event) => peek(event.target.closest(".token")));
  box.addEventListener("pointerleave", () => peek(null));
  box.addEventListener("blur", () => peek(null));
  box.addEventListener("click", (event) => peek(event.target.closest(".token")));
  box.addEventListener("keydown", (event) => {
    const all = [...box.querySelectorAll(".token")].filter((each) => kept.get(each)?.top);
    const now = all.indexOf(at);
    const next = { ArrowRight: now + 1, ArrowLeft: now < 0 ? all.length - 1 : now - 1, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined || !all.length) return;
    event.preventDefault();
    const span = all[Math.min(Math.max(next, 0), all.length - 1)];
    span.scrollIntoView({ block: "nearest" });
    peek(span);
  });
}

/** Reads a text out in sentences as it comes, or what there is once it rests. */
export class Voice {
  constructor(box) {
    this.box = box;
    this.rest = "";
    box.replaceChildren();
  }

  add(text) {
    this.rest += text;
    const end = this.rest.search(/[.!?\n][^.!?\n]*$/);
    if (end >= 40 || this.rest.length > 200) this.say(end >= 0 ? end + 1 : this.rest.length);
  }

  say(length = this.rest.length) {
    const text = this.rest.slice(0, length).trim();
    this.rest = this.rest.slice(length);
    if (text) this.box.append(h("p", {}, text));
  }
}
