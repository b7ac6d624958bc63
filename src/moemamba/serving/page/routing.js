// Routing: which experts the tokens of a text visit, in which layer, with which gate.

import { $, chip, count, h, layerOf, many, percent, rove, sends, shown } from "./dom.js";
import { attempt, get, post } from "./api.js";
import { remember } from "./link.js";
import { hue, Score } from "./score.js";
import { bar } from "./tokens.js";

let score = null;
let found = null;
let state = null;
let read = null; // the text that is shown
let shares = []; // of each layer: choices of each expert in this text
let reading = 0;

export function begin(model) {
  score = new Score($("score"));
  if (!model.routers.length) $("read-text").placeholder = "This model has no experts, so there is nothing to see here.";
  $("reading").onsubmit = (event) => { event.preventDefault(); attempt(look); };
  $("read-text").onkeydown = (event) => {
    if (sends(event)) attempt(look);
  };
  $("score").addEventListener("pointermove", (event) => point(score.under(event)));
  $("score").addEventListener("click", (event) => {
    const place = score.under(event);
    if (!place) return;
    point(place);
    choose(place[1], place[2]);
  });
  $("score").addEventListener("keydown", keys);
  rove($("experts"));
}

export async function show(values, again) {
  if (again) return score.soon();
  follow(values.state ?? null);
  if (values.text === undefined) return;
  if (values.text !== read) {
    $("read-text").value = values.text;
    await look();
  }
  if (!found) return;
  const number = (name, end) => (values[name] !== undefined && values[name] >= 0 && values[name] < end ? Number(values[name]) : null);
  const layer = number("layer", score.layers);
  const expert = layer === null ? null : number("expert", found.n_experts[layer]);
  const token = number("token", score.tokens);
  if (token !== null) point([token, layer ?? 0]);
  if (expert !== null && `${score.only}` !== `${[layer, expert]}`) choose(layer, expert);
}

const link = () => remember("routing", {
  text: read, state, token: score.at, ...(score.only && { layer: score.only[0], expert: score.only[1] }),
});

function follow(id) {
  if (state !== id) read = null;
  state = id;
  chip($("read-after"), id, () => follow(null));
}

async function look() {
  const text = $("read-text").value, own = ++reading;
  $("read-told").textContent = "reading";
  let answer;
  try {
    answer = await post("/v1/routing", { prompt: text, ...(state && { state }) });
  } finally {
    if (own === reading) $("read-told").textContent = "";
  }
  if (own !== reading) return; // another text has been asked for meanwhile
  if (!answer.layers.length) {
    $("read-told").textContent = "This model has no experts.";
    return;
  }
  read = text;
  found = answer;
  found.numbers = found.layers.map(layerOf);
  $("found").hidden = false;
  $("read-told").textContent = `${many(found.tokens.length, "token")} through ${many(found.layers.length, "layer")}`;
  const began = performance.now();
  score.set(found);
  performance.measure("routing drawn", { start: began });
  tally();
  experts();
  $("expert").replaceChildren();
  $("token").replaceChildren(h("p", { className: "soft" }, "Point at a token, or walk with the arrow keys."));
  link();
}

function tally() {
  shares = found.n_experts.map((n) => new Array(n).fill(0));
  const { experts: all } = score.found;
  for (let i = 0; i < all.length; i++) if (all[i] >= 0) shares[Math.floor(i / score.k) % score.layers][all[i]]++;
}

const sum = (values) => values.reduce((a, b) => a + b, 0);

/** A bar for each expert of each layer. */
function experts() {
  $("experts").replaceChildren(...shares.map((own, layer) => {
    const most = Math.max(...own), all = sum(own);
    const bars = own.map((value, expert) => {
      const button = h("button", { tabIndex: layer + expert ? -1 : 0, onclick: () => choose(layer, expert) });
      button.title = `Layer ${found.numbers[layer]}, expert ${expert}: ${percent(value / all)}`;
      button.ariaLabel = button.title;
      button.style.setProperty("--part", most ? value / most : 0);
      button.style.setProperty("--hue", hue(expert, own.length));
      button.dataset.place = `${layer},${expert}`;
      return button;
    });
    return h("div", { className: "row" }, h("span", { className: "soft" }, found.numbers[layer]), h("div", {}, ...bars));
  }));
}

/** Show a token: its layers, experts and gates. */
function point(place) {
  if (!place || !found) return;
  const [token, layer] = place;
  if (score.at === token && score.layer === layer) return;
  score.at = token;
  score.layer = layer;
  score.soon();
  const p = found.token_logprobs[token];
  $("token").replaceChildren(
    h("h2", {}, h("code", {}, shown(found.strings[token]))),
    h("p", { className: "soft" }, `token ${count(token + 1)} of ${count(score.tokens)}${p === null ? "" : `, which had ${percent(Math.exp(p))}`}`),
    h("table", {}, h("tbody", {}, ...found.layers.map((_, l) => line(token, l)))));
}

function line(token, layer) {
  const own = score.choices(token, layer);
  return h("tr", { className: layer === score.layer ? "chosen" : "" },
    h("th", { scope: "row", title: found.layers[layer] }, found.numbers[layer]),
    h("td", {}, ...own.map(([expert, gate]) => {
      const dot = h("i", { className: "dot" });
      dot.style.background = hue(expert, found.n_experts[layer]);
      return h("span", { className: "visit" }, dot, `${expert}`, bar(gate), percent(gate));
    })));
}

/** Show one expert: its load and its tokens; once more lets it go. */
function choose(layer, expert) {
  if (expert === null) return;
  const same = score.only?.[0] === layer && score.only[1] === expert;
  score.only = same ? null : [layer, expert];
  for (const each of $("experts").querySelectorAll("button")) each.setAttribute("aria-pressed", each.dataset.place === `${score.only}`);
  score.draw();
  link();
  if (same) return $("expert").replaceChildren();
  const visits = new Map();
  for (let i = 0; i < score.tokens; i++) {
    const gate = score.choices(i, layer).find(([e]) => e === expert)?.[1];
    if (gate === undefined) continue;
    const own = visits.get(found.strings[i]) ?? { count: 0, gate: 0, first: i };
    visits.set(found.strings[i], { ...own, count: own.count + 1, gate: own.gate + gate });
  }
  const often = [...visits].sort((a, b) => b[1].count - a[1].count || b[1].gate - a[1].gate);
  const served = h("dd", {}, "–");
  $("expert").replaceChildren(
    h("h2", {}, `Layer ${found.numbers[layer]}, expert ${expert}`),
    h("dl", {},
      h("dt", {}, "of this text"), h("dd", {}, percent(shares[layer][expert] / sum(shares[layer]))),
      h("dt", {}, "an even share"), h("dd", {}, percent(1 / found.n_experts[layer])),
      h("dt", {}, "of all prompts"), served),
    h("p", { className: "words" }, ...often.slice(0, 60).map(([text, own]) => h("button", {
      className: "word", title: `mean gate ${percent(own.gate / own.count)}; goes to the first`,
      onclick: () => reveal(own.first, layer),
    }, shown(text), h("small", {}, own.count > 1 ? ` ${own.count}` : "")))),
    h("p", { className: "soft" }, often.length > 60 ? `and ${many(often.length - 60, "other token")}` : often.length ? "" : "no token of this text"));
  attempt(async () => {
    const load = (await get("/v1/stats")).experts[layer]?.load ?? [];
    if (sum(load)) served.textContent = percent(load[expert] / sum(load));
  });
}

function reveal(token, layer) {
  point([token, layer]);
  const top = $("score").getBoundingClientRect().top + score.lineOf(token) * score.line;
  if (top < 60 || top + score.line > innerHeight) scrollBy({ top: top - innerHeight / 3 });
  link();
}

function keys(event) {
  if (!found) return;
  const at = score.at ?? -1, row = score.lineOf(Math.max(at, 0)), { layer } = score;
  const places = {
    ArrowRight: [at + 1, layer], ArrowLeft: [at - 1, layer], ArrowDown: [at, layer + 1], ArrowUp: [at, layer - 1],
    PageDown: [score.first[row + 1] ?? Infinity, layer], PageUp: [score.first[row - 1] ?? 0, layer],
    Home: [0, layer], End: [Infinity, layer],
  };
  const place = places[event.key];
  if (place) reveal(...place.map((each, i) => Math.max(0, Math.min(each, (i ? score.layers : score.tokens) - 1))));
  else if (event.key === "Escape" && score.only) choose(...score.only);
  else if (event.key === "Enter" && at >= 0) choose(layer, score.choices(at, layer)[0]?.[0] ?? null);
  else return;
  event.preventDefault();
}
