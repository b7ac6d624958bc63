// How tokens are chosen: the fields of the form, as the server and as links name them.

import { $ } from "./dom.js";
import { Problem } from "./api.js";

const form = document.querySelector("#settings form");
const fields = [...form.elements].filter((each) => each.name);
const WORDS = { "\\n": "\n", "\\t": "\t" };
const usual = Object.fromEntries(fields.map((each) => [each.name, each.defaultValue]));

export function begin(model, changed) {
  form.onsubmit = (event) => event.preventDefault();
  form.elements.max_tokens.max = model.max_tokens;
  form.addEventListener("input", changed);
  if (matchMedia("(max-width: 60rem)").matches) $("settings").open = false;
}

/** What a request has of them; raises Problem for a value that cannot be. */
export function asked() {
  const wrong = fields.find((each) => !each.checkValidity());
  if (wrong) {
    $("settings").open = true;
    wrong.focus();
    throw new Problem(`${wrong.parentElement.textContent.trim()}: ${wrong.validationMessage}`);
  }
  const found = {};
  for (const { name, type, value } of fields) {
    if (type === "number" && value !== "") found[name] = Number(value);
  }
  const stop = form.elements.stop.value.replace(/\\[nt]/g, (each) => WORDS[each]);
  return stop ? { ...found, stop } : found;
}

export const shaded = () => form.elements.shade.checked;

/** Those that are not as they usually are, for a link. */
export function differing() {
  const found = {};
  for (const { name, type, value, checked } of fields) {
    if (type === "checkbox" ? checked : value !== usual[name]) found[name] = type === "checkbox" ? 1 : value || "none";
  }
  return found;
}

export function restore(values) {
  for (const each of fields) {
    const value = values[each.name];
    if (each.type === "checkbox") each.checked = value === "1";
    else each.value = value === undefined ? usual[each.name] : value === "none" ? "" : value;
  }
}
