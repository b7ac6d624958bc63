// Write: a text that the model continues as you watch, or a conversation.

import { $, chip, count, h, many, sends, short } from "./dom.js";
import { attempt, complain, content, post, stream } from "./api.js";
import { remember, visit } from "./link.js";
import * as settings from "./settings.js";
import { append, inspect, ofAnswer, ofCompletion, peek, Voice } from "./tokens.js";

const now = {
	chat: false,
	base: "", // what the model was given
	made: "", // what it has written, with this seed
	seed: null,
	state: null, // that the text follows
	turns: [],
};
let writing = null;

export function begin(model) {
	$("mode").hidden = !model.chat;
	settings.begin(model, () => { shade(); link(); });
	inspect($("story"));
	inspect($("turns"));
	$("prompt").addEventListener("input", link);
	$("go").onclick = () => (writing ? writing.abort() : go());
	$("again").onclick = () => (now.chat ? answerAgain() : write(now.base, null));
	$("edit").onclick = edit;
	$("story").ondblclick = edit;
	$("keep").onclick = () => attempt(keep);
	$("route").onclick = () => visit("routing", { text: whole(), state: now.state });
	for (const each of $("mode").children) each.onclick = () => { now.chat = each.value === "chat"; edit(); };
	$("write").addEventListener("keydown", (event) => {
		const says = now.chat && event.key === "Enter" && !event.shiftKey && event.target === $("prompt");
		if (!writing && (sends(event) || says)) go();
		else if (event.key === "Escape") writing ? writing.abort() : peek(null);
		else return;
		event.preventDefault();
	});
	addEventListener("scroll", () => peek(null), { passive: true });
	frame();
}

/** Shows what a link says; what was written is written again, which gives the same. */
export function show(values, again) {
	if (again || writing) return;
	settings.restore({ ...values, seed: values.wrote ? values.fixed && values.seed : values.seed });
	now.chat = values.chat === "1" && !$("mode").hidden;
	now.state = values.state ?? null;
	now.turns = [];
	try { now.turns = JSON.parse(values.turns ?? "[]").map(([role, text]) => ({ role, content: `${text}` })); } catch { /* cut */ }
	$("turns").replaceChildren(...now.turns.map(turn));
	$("prompt").value = values.text ?? "";
	Object.assign(now, { base: "", made: "", seed: null });
	frame();
	if (values.wrote && !now.chat) return write(values.text ?? "", Number(values.seed));
}

export const hide = () => peek(null);

function link() {
	const own = { ...settings.differing(), state: now.state, chat: now.chat ? 1 : null };
	if (own.seed === "none") delete own.seed;
	if (now.chat) own.turns = now.turns.length ? JSON.stringify(now.turns.map((each) => [each.role, each.content])) : null;
	const wrote = !now.chat && now.seed !== null;
	if (wrote) Object.assign(own, { fixed: own.seed && 1, seed: now.seed, wrote: 1 });
	remember("write", { text: wrote ? now.base : $("prompt").value, ...own });
}

/** What is shown in which state. */
function frame() {
	const wrote = now.seed !== null;
	$("prompt").hidden = wrote && !now.chat;
	$("story").hidden = !wrote || now.chat;
	$("turns").hidden = !now.chat || !now.turns.length;
	$("prompt").placeholder = now.chat ? "Say something." : "Begin a text. The model goes on.";
	$("go").textContent = writing ? "Stop" : now.chat ? "Send" : wrote ? "Write on" : "Write";
	$("keep").hidden = $("route").hidden = Boolean(writing) || now.chat;
	$("edit").hidden = $("keep").hidden || !wrote;
	$("again").hidden = Boolean(writing) || (now.chat ? now.turns.at(-1)?.role !== "assistant" : !wrote);
	chip($("after"), now.state, () => { now.state = null; frame(); link(); });
	for (const each of $("mode").children) each.setAttribute("aria-pressed", (each.value === "chat") === now.chat);
	$("write").classList.toggle("busy", Boolean(writing));
	shade();
}

const shade = () => $("write").classList.toggle("shaded", settings.shaded());

function edit() {
	if (writing) return;
	if (!now.chat) $("prompt").value = whole();
	Object.assign(now, { base: "", made: "", seed: null });
	peek(null);
	$("told").textContent = "";
	frame();
	$("prompt").focus();
	link();
}

const whole = () => (now.seed === null ? $("prompt").value : now.base + now.made);

function go() {
	if (now.chat) return say($("prompt").value.trim());
	return write(whole(), null);
}

const anySeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** Continue a text. */
function write(base, seed) {
	return attempt(async () => {
		const asked = settings.asked();
		Object.assign(now, { base, made: "", seed: seed ?? asked.seed ?? anySeed() });
		$("story").replaceChildren(h("span", { className: "given" }, base));
		const body = { ...asked, prompt: base, seed: now.seed, logprobs: 5, ...after() };
		let before = 0;
		link();
		const finish = await follow("/v1/completions", body, $("story"), (choice) => {
			const found = ofCompletion(choice.text, choice.logprobs, before);
			before += [...choice.text].length;
			now.made += choice.text;
			return found;
		});
		if (finish === "broken off" && !now.made) edit();
	});
}

/** Send a message, and have it answered. */
function say(text) {
	if (!text) return $("prompt").focus();
	return attempt(async () => {
		const asked = settings.asked();
		const message = { role: "user", content: text };
		now.turns.push(message);
		$("turns").append(turn(message));
		if ($("prompt").value.trim() === text) $("prompt").value = "";
		const answer = { role: "assistant", content: "" }, item = turn(answer), decoder = new TextDecoder();
		$("turns").append(item);
		const body = { ...asked, messages: [...now.turns], logprobs: true, top_logprobs: 5, ...after() };
		await follow("/v1/chat/completions", body, item.lastElementChild, (choice) => {
			const text = choice.delta?.content ?? "";
			answer.content += text;
			return ofAnswer(text, choice.logprobs, decoder);
		});
		if (answer.content) now.turns.push(answer);
		else { // nothing is lost
			now.turns.pop();
			$("turns").replaceChildren(...now.turns.map(turn));
			$("prompt").value = text;
		}
		frame();
		link();
		$("prompt").focus();
	});
}

function answerAgain() {
	const [asked] = now.turns.splice(-2);
	for (const each of [...$("turns").children].slice(-2)) each.remove();
	return say(asked.content);
}

const after = () => (now.state ? { state: now.state } : {});

const turn = ({ role, content: text }) =>
	h("li", { className: role }, h("b", {}, role === "user" ? "You" : "Model"), h("div", { className: "prose", tabIndex: 0 }, text));

/** Show an answer as it comes, until it ends or is stopped; raises Problem. */
async function follow(path, body, box, take) {
	writing = new AbortController();
	const voice = new Voice($("heard"));
	const began = performance.now();
	let first = null, tokens = 0, finish = null, usage = null, fresh = [], drawing = 0;
	const draw = () => { // once a frame, however fast they come
		drawing = 0;
		const follows = innerHeight + scrollY > document.documentElement.scrollHeight - 40;
		append(box, fresh);
		fresh = [];
		$("told").textContent = many(tokens, "token");
		if (follows) scrollTo({ top: document.documentElement.scrollHeight });
	};
	frame();
	$("told").ariaLive = "off"; // figures that run are not read out
	try {
		for await (const event of stream(path, body, writing.signal)) {
			usage = event.usage ?? usage;
			const choice = event.choices[0];
			if (!choice) continue;
			const found = take(choice);
			fresh.push(...found);
			voice.add(found.map((each) => each.text).join(""));
			tokens += found.filter((each) => each.p !== undefined).length;
			if (tokens) first ??= performance.now();
			finish = choice.finish_reason ?? finish;
			drawing ||= requestAnimationFrame(draw);
		}
	} catch (error) {
		finish = error.name === "AbortError" ? "stopped" : "broken off";
		if (finish !== "stopped") complain(error);
	} finally {
		writing = null;
		cancelAnimationFrame(drawing);
		draw();
		voice.say();
		$("told").ariaLive = "polite";
		$("told").textContent = account({ began, first, tokens, finish, usage });
		frame();
	}
	return finish;
}

function account({ began, first, tokens, finish, usage }) {
	const cached = usage?.prompt_tokens_details.cached_tokens;
	return [
		many(usage?.completion_tokens ?? tokens, "token"),
		tokens > 1 && `${count((1000 * tokens) / (performance.now() - began))} a second`, // what comes at once has no rate of its own
		first && `first after ${count(first - began)} ms`,
		cached && `${count(cached)} of ${count(usage.prompt_tokens)} before were known`,
		finish === "stop" ? "ended by itself" : finish !== "length" && finish,
		now.chat ? "" : `seed ${now.seed}`,
	].filter(Boolean).join(" · ");
}

async function keep() {
	const made = await post("/v1/states", { prompt: whole(), ...(now.state && { from: now.state }) });
	content();
	$("told").replaceChildren("kept as ", h("a", { href: `#states?state=${made.id}` }, `state ${short(made.id)}`), `, ${many(made.tokens, "token")}`);
}
