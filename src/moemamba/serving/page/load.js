// Load: what the server does now, looked at once a second while it is in view.

import { $, bytes, color, count, h, layerOf, many, percent, sharp } from "./dom.js";
import { complain, content, ask, get } from "./api.js";
import { remember } from "./link.js";
import { hue } from "./score.js";

const KEPT = 120; // seconds
let timer = null;
let last = null;
let speeds = [];

export function show() {
  remember("load", {});
  if (timer) return;
  last = null;
  timer = setInterval(look, 1000);
  return look();
}

export function hide() {
  clearInterval(timer);
  timer = null;
}

let failing = false;

async function look() {
  if (document.hidden) return;
  try {
    const [stats, text] = [await get("/v1/stats"), await (await ask("GET", "/metrics")).text()];
    if (failing) content();
    failing = false;
    draw(stats, text);
  } catch (error) {
    failing = true;
    last = null;
    complain(error);
  }
}

function draw(stats, text) {
  const at = performance.now();
  if (last) {
    const made = stats.generated_tokens_total - last.made;
    speeds = [...speeds, Math.max(0, (1000 * made) / (at - last.at))].slice(-KEPT);
  }
  last = { at, made: stats.generated_tokens_total };
  $("speed").textContent = count(speeds.at(-1) ?? 0);
  chart();
  $("slots").textContent = `${stats.slots_in_use} of ${stats.slots}`;
  $("boxes").replaceChildren(...Array.from({ length: Math.min(stats.slots, 128) }, (_, i) => h("i", { className: i < stats.slots_in_use ? "on" : "" })));
  $("waiting").textContent = count(stats.num_requests_waiting);
  const asked = stats.prefix_cache_queries_total;
  $("cache").textContent = asked ? percent(stats.prefix_cache_hits_total / asked) : "–";
  $("cache-more").textContent = `of prompt tokens were known; ${many(stats.state_cache_states, "state")}, ${bytes(stats.state_cache_bytes)}`;
  const times = Object.entries({ "First token": "time_to_first_token", "Between tokens": "inter_token_latency", "Whole answer": "e2e_request_latency" });
  $("times").replaceChildren(
    ...times.flatMap(([label, name]) => [h("dt", {}, label), h("dd", {}, spread(text, `moemamba:${name}_seconds`))]),
    h("dt", {}, "Tokens written"), h("dd", {}, count(stats.generated_tokens_total)),
    h("dt", {}, "States kept"), h("dd", {}, `${count(stats.kept_states)}, ${bytes(stats.kept_state_bytes)}`),
    h("dt", {}, "Server"), h("dd", {}, stats.draining ? "about to stop" : "answers"));
  loads(stats.experts);
}

/** Median and 99th hundredth of a histogram of Prometheus, as bounds of its buckets. */
function spread(text, name) {
  const buckets = [...text.matchAll(new RegExp(`^${name}_bucket\\{le="([^"]+)"\\} (\\d+)`, "gm"))].map((each) => [each[1], Number(each[2])]);
  const all = buckets.at(-1)?.[1];
  if (!all) return "–";
  const bound = (part) => {
    const le = buckets.find(([, n]) => n >= part * all)[0];
    return le === "+Inf" ? "over 600 s" : Number(le) < 1 ? `${Number(le) * 1000} ms` : `${le} s`;
  };
  return `half within ${bound(0.5)}, 99% within ${bound(0.99)}`;
}

function chart() {
  const canvas = $("history"), width = canvas.parentElement.clientWidth, height = 48;
  const pen = sharp(canvas, width, height);
  const most = Math.max(1, ...speeds), step = width / (KEPT - 1);
  const x = (i) => width - (speeds.length - 1 - i) * step, y = (value) => height - 1 - (value / most) * (height - 4);
  pen.strokeStyle = color("--line");
  pen.strokeRect(0, height - 0.5, width, 0);
  if (!speeds.length) return;
  pen.beginPath();
  speeds.forEach((value, i) => pen.lineTo(x(i), y(value)));
  pen.strokeStyle = color("--accent");
  pen.lineWidth = 1.5;
  pen.stroke();
  pen.lineTo(width, height);
  pen.lineTo(x(0), height);
  pen.globalAlpha = 0.12;
  pen.fillStyle = color("--accent");
  pen.fill();
}

function loads(layers) {
  if (!layers.length) return $("loads").replaceChildren(h("p", { className: "soft" }, "This model has no experts, or has read nothing yet."));
  $("loads").replaceChildren(...layers.map(({ layer, load }, place) => {
    const all = load.reduce((a, b) => a + b, 0), most = Math.max(...load, 1e-9);
    const share = (value) => (all ? value / all : 0);
    const bars = load.map((value, expert) => {
      const made = h("i", { title: `expert ${expert}: ${percent(share(value))}` });
      made.style.setProperty("--part", value / most);
      made.style.setProperty("--hue", hue(expert, load.length));
      return made;
    });
    const box = h("div", { role: "img", ariaLabel: load.map((value, expert) => `expert ${expert} ${percent(share(value))}`).join(", ") }, ...bars);
    box.style.setProperty("--even", all / load.length / most);
    return h("div", { className: "row", title: layer }, h("span", { className: "soft" }, layerOf(layer, place)), box);
  }));
}
