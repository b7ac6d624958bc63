// The map, written like a score: lines of text, and below each a stave with a line for each layer. A cell is as wide as
// its token; its colour is the expert, its strength the gate. Only what is in view is drawn.

import { color, sharp, shown } from "./dom.js";

const GUTTER = 26, TEXT = 20, GAP = 16;
const FONT = 'ui-monospace, Menlo, Consolas, monospace';

/** Arrays from the base64 of little-endian int16 and float16. */
export function decode(found) {
	const raw = (text) => Uint8Array.from(atob(text), (each) => each.charCodeAt(0)).buffer;
	return { experts: new Int16Array(raw(found.experts)), gates: Float32Array.from(new Uint16Array(raw(found.gates)), half) };
}

/** The number that 16 bits spell; gates are neither negative nor infinite. */
function half(bits) {
	const exponent = bits >> 10, fraction = (bits & 1023) / 1024;
	return exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction;
}

/** A space before a word keeps its place, without a mark; half a character is its bytes alone. */
const spelled = (text) => (/^ +\S/.test(text) ? " " : "") + shown(text.replace(/^ +(?=\S)|^bytes:(?=\\x)/, ""));

/** The colour of an expert: hues as far from each other as there are experts, all of one strength. */
export function hue(expert, count) {
	const turn = count <= 12 ? expert / count : (expert * 0.381966) % 1;
	const dark = matchMedia("(prefers-color-scheme: dark)").matches;
	const light = (dark ? 0.7 : 0.68) + (count > 12 ? 0.07 * ((expert % 3) - 1) : 0);
	return `oklch(${light} 0.125 ${(25 + 360 * turn).toFixed(1)})`;
}

export class Score {
	/** Of what the server found: tokens, layers and k experts each; `at` is a token, `only` [layer, expert]. */
	constructor(box) {
		this.box = box;
		this.canvas = box.firstElementChild;
		this.found = null;
		this.at = null;
		this.layer = 0;
		this.only = null;
		this.wanted = false;
		addEventListener("scroll", () => this.soon(), { passive: true });
		matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.soon());
		new ResizeObserver(() => { if (this.found && box.clientWidth !== this.width) { this.layout(); this.soon(); } }).observe(box);
		addEventListener("resize", () => this.soon());
	}

	set(found) {
		this.found = { ...found, ...decode(found) };
		[this.tokens, this.layers, this.k] = found.shape;
		this.cell = this.layers <= 8 ? 10 : this.layers <= 16 ? 8 : 5;
		this.at = this.only = null;
		this.layout();
		this.draw();
	}

	/** Where each token stands: its line, its left edge and its width. */
	layout() {
		const pen = this.canvas.getContext("2d");
		pen.font = `12px ${FONT}`;
		this.width = this.box.clientWidth;
		const widths = new Map();
		this.x = new Float32Array(this.tokens);
		this.w = new Float32Array(this.tokens);
		this.first = [0]; // token of each line
		let x = GUTTER;
		for (let i = 0; i < this.tokens; i++) {
			const text = this.found.strings[i];
			let w = widths.get(text);
			if (w === undefined) {
				w = Math.min(Math.max(12, Math.ceil(pen.measureText(spelled(text)).width) + 5), Math.max(this.width - GUTTER, 40), 180);
				widths.set(text, w);
			}
			if (x + w > this.width && x > GUTTER) {
				this.first.push(i);
				x = GUTTER;
			}
			this.x[i] = x;
			this.w[i] = w;
			x += w;
		}
		this.line = TEXT + this.layers * this.cell + GAP;
		this.box.style.height = `${this.first.length * this.line}px`;
	}

	lineOf(token) {
		return this.first.findLastIndex((first) => first <= token);
	}

	soon() {
		if (this.wanted || !this.found) return;
		this.wanted = true;
		requestAnimationFrame(() => { this.wanted = false; this.draw(); });
	}

	/** Draw the lines in view, and some above and below. */
	draw() {
		if (!this.found || !this.box.clientWidth) return;
		const top = -this.box.getBoundingClientRect().top;
		const from = Math.max(0, Math.min(Math.floor((top - 300) / this.line), this.first.length - 1));
		const to = Math.min(this.first.length, Math.max(from + 1, Math.ceil((top + innerHeight + 300) / this.line)));
		this.canvas.style.top = `${from * this.line}px`;
		this.paint(sharp(this.canvas, this.width, (to - from) * this.line), from, to);
	}

	paint(pen, from, to) {
		const { strings, experts, gates, n_experts: counts } = this.found;
		const ink = color("--ink"), soft = color("--soft"), line = color("--line");
		const colors = counts.map((n) => Array.from({ length: n }, (_, e) => hue(e, n)));
		const { layers, k, cell } = this;
		for (let row = from; row < to; row++) {
			const y = (row - from) * this.line, stave = y + TEXT;
			const first = this.first[row], last = this.first[row + 1] ?? this.tokens;
			pen.font = `9px ${FONT}`;
			pen.fillStyle = soft;
			for (let l = 0; l < layers; l++) if (cell >= 8 || l % 4 === 0) pen.fillText(this.found.numbers[l], 0, stave + (l + 0.5) * cell + 3);
			for (let i = first; i < last; i++) {
				const x = this.x[i], w = this.w[i] - 1;
				for (let l = 0; l < layers; l++) {
					const place = (i * layers + l) * k;
					let sum = 0;
					for (let j = 0; j < k; j++) if (experts[place + j] >= 0) sum += gates[place + j];
					let left = cell - 1, above = stave + l * cell;
					for (let j = 0; j < k; j++) {
						const expert = experts[place + j];
						if (expert < 0) continue;
						const height = sum > 0 ? ((cell - 1) * gates[place + j]) / sum : (cell - 1) / k;
						const hidden = this.only && (this.only[0] !== l || this.only[1] !== expert);
						pen.globalAlpha = hidden ? 1 : 0.35 + 0.65 * Math.sqrt(Math.min(1, sum));
						pen.fillStyle = hidden ? line : colors[l][expert];
						pen.fillRect(x, above, w, Math.min(height, left));
						above += height;
						left -= height;
					}
				}
			}
			pen.globalAlpha = 1;
			pen.font = `12px ${FONT}`;
			for (let i = first; i < last; i++) {
				pen.fillStyle = this.only && !this.visits(i, ...this.only) ? soft : ink;
				pen.fillText(spelled(strings[i]), this.x[i] + 1, y + 14, this.w[i] - 2);
			}
			if (this.at !== null && this.at >= first && this.at < last) {
				pen.strokeStyle = ink;
				pen.lineWidth = 1;
				pen.strokeRect(this.x[this.at] - 0.5, stave - 1.5, this.w[this.at], layers * cell + 2);
				pen.lineWidth = 2;
				pen.strokeStyle = color("--accent");
				pen.strokeRect(this.x[this.at] - 0.5, stave + this.layer * cell - 1, this.w[this.at], cell + 1);
			}
		}
	}

	/** Experts that a token visits in a layer, with their gates. */
	choices(token, layer) {
		const place = (token * this.layers + layer) * this.k;
		return Array.from({ length: this.k }, (_, j) => [this.found.experts[place + j], this.found.gates[place + j]]).filter(([e]) => e >= 0);
	}

	visits(token, layer, expert) {
		const place = (token * this.layers + layer) * this.k;
		return this.found.experts.subarray(place, place + this.k).includes(expert);
	}

	/** [token, layer, expert] below a pointer; null where there is nothing. */
	under(event) {
		const box = this.box.getBoundingClientRect();
		const x = event.clientX - box.left, y = event.clientY - box.top;
		const row = Math.floor(y / this.line);
		if (row < 0 || row >= this.first.length) return null;
		const last = this.first[row + 1] ?? this.tokens;
		for (let i = this.first[row]; i < last; i++) {
			if (x < this.x[i] || x >= this.x[i] + this.w[i]) continue;
			const inside = (y - row * this.line - TEXT) / this.cell;
			const layer = Math.min(Math.max(Math.floor(inside), 0), this.layers - 1);
			return [i, layer, this.within(i, layer, inside - layer)];
		}
		return null;
	}

	/** The expert whose part of a cell is at a height from 0 to 1. */
	within(token, layer, height) {
		const own = this.choices(token, layer);
		let left = height * own.reduce((sum, [, gate]) => sum + gate, 0);
		for (const [expert, gate] of own) if ((left -= gate) < 0) return expert;
		return own[0]?.[0] ?? null;
	}
}
