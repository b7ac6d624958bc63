// The page: waits for the model, and shows the view that the address names.

import { $ } from "./dom.js";
import { attempt, complain, content, get } from "./api.js";
import { current, here, seen } from "./link.js";
import * as load from "./load.js";
import * as routing from "./routing.js";
import * as states from "./states.js";
import * as write from "./write.js";

const views = { write, routing, states, load };
let open = null;

function show() {
	const { view, values } = here();
	const name = view in views ? view : "write";
	content();
	if (open !== name) {
		if (open) views[open].hide?.();
		for (const each of Object.keys(views)) $(each).hidden = each !== name;
		open = name;
		current(name);
		document.title = `moemamba · ${name}`;
	}
	if (!(view in views)) history.replaceState(null, "", "#write");
	const again = seen[name] === location.hash;
	seen[name] = location.hash;
	attempt(() => views[name].show(values, again));
}

/** The model, once it is loaded; what is being done is shown meanwhile. */
async function model() {
	for (;;) {
		try {
			return (await get("/v1/models")).data[0];
		} catch (error) {
			if (error.status !== 503) throw error;
			$("model").textContent = error.message;
			await new Promise((go) => setTimeout(go, 700));
		}
	}
}

$("problem").lastElementChild.onclick = content;
$("skip").onclick = (event) => {
	event.preventDefault(); // the address is the view's
	$("main").focus();
};
$("copy").hidden = !navigator.clipboard; // there is none without TLS, but on this machine
$("copy").onclick = () => attempt(async () => {
	await navigator.clipboard.writeText(location.href);
	$("copy").textContent = "Copied";
	setTimeout(() => { $("copy").textContent = "Copy link"; }, 1500);
});

try {
	const found = await model();
	const experts = found.routers.map((each) => each.n_experts);
	$("model").textContent = [found.id, `${found.pattern} × ${found.n_blocks}`, experts.length && `${Math.max(...experts)} experts`]
		.filter(Boolean).join(" · ");
	for (const each of Object.values(views)) each.begin?.(found);
	addEventListener("hashchange", show);
	show();
} catch (error) {
	$("model").textContent = "no model";
	complain(error);
}
document.body.dataset.ready = "";
