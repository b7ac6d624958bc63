// Load: what the server does now, looked at once a second while it is in view.

import { $, bar, bytes, color, count, h, layerOf, many, percent, sharp, sum } from "./dom.js";
import { complain, content, get } from "./api.js";
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

async function look() {
	if (document.hidden) return;
	try {
		const stats = await get("/v1/stats");
		content();
		draw(stats);
	} catch (error) {
		last = null;
		complain(error);
	}
}

function draw(stats) {
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
	$("cache-more").textContent = `of prompt tokens; ${many(stats.state_cache_states, "state")}, ${bytes(stats.state_cache_bytes)}`;
	loads(stats.experts);
}

function chart() {
	const canvas = $("history"), width = canvas.parentElement.clientWidth, height = 48;
	const pen = sharp(canvas, width, height);
	const most = Math.max(1, ...speeds), step = width / (KEPT - 1);
	const x = (i) => width - (speeds.length - 1 - i) * step, y = (value) => height - 1 - (value / most) * (height - 4);
	if (!speeds.length) return;
	pen.beginPath();
	speeds.forEach((value, i) => pen.lineTo(x(i), y(value)));
	pen.strokeStyle = color("--accent");
	pen.lineWidth = 1.5;
	pen.stroke();
}

function loads(layers) {
	$("loads").replaceChildren(...layers.map(({ layer, load }, place) => {
		const all = sum(load) || 1, most = Math.max(...load) || 1;
		const bars = load.map((value, expert) =>
			bar(value / most, h("i", { title: `expert ${expert}: ${percent(value / all)}` }), hue(expert, load.length)));
		const box = h("div", { role: "img", ariaLabel: bars.map((each) => each.title).join(", ") }, ...bars);
		box.style.setProperty("--even", all / load.length / most);
		return h("div", { className: "row", title: layer }, h("span", { className: "soft" }, layerOf(layer, place)), box);
	}));
}
