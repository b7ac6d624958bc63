// Elements, and how things are spelled on the page.

export const $ = (id) => document.getElementById(id);

/** An element. What it has as a property is set as one, so that no inline handler or style is ever parsed. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Says which state a text follows, and lets it follow none. */
export function chip(box, id, clear) {
  box.hidden = !id;
  box.firstElementChild.textContent = id && `after state ${short(id)}`;
  box.lastElementChild.onclick = clear;
}

/** Enter with Ctrl or the command key. */
export const sends = (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey);

export const count = (value) => Math.round(value).toLocaleString("en");
export const many = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

export function percent(value) {
  const p = 100 * value;
  return `${p >= 99.95 || p === 0 ? p.toFixed(0) : p >= 1 ? p.toFixed(1) : p >= 0.01 ? p.toFixed(2) : "<0.01"}%`;
}

export function bytes(value) {
  if (value < 1000) return many(value, "byte");
  return value < 1e6 ? `${count(value / 1e3)} kB` : `${(value / 1e6).toFixed(value < 1e7 ? 1 : 0)} MB`;
}

/** A token as it is shown by itself: white space is made visible. */
export const shown = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";

export const short = (id) => id.replace("state-", "").slice(0, 6);

/** The number of a layer, of a name such as layers.3.branches.0. */
export const layerOf = (name, place) => name.match(/\d+/)?.[0] ?? `${place}`;

export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A canvas of so many pixels of CSS, sharp on any screen; its context. */
export function sharp(canvas, width, height) {
  const ratio = Math.min(window.devicePixelRatio || 1, 3);
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return pen;
}

/** Arrow keys among buttons, of which the last used one is in the tab order. */
export function rove(box) {
  box.addEventListener("keydown", (event) => {
    const all = [...box.querySelectorAll("button")], at = all.indexOf(document.activeElement);
    const row = box.firstElementChild.querySelectorAll("button").length;
    const next = at + ({ ArrowRight: 1, ArrowLeft: -1, ArrowDown: row, ArrowUp: -row }[event.key] ?? NaN);
    if (at < 0 || !all[next]) return;
    event.preventDefault();
    all[at].tabIndex = -1;
    all[next].tabIndex = 0;
    all[next].focus();
  });
}
