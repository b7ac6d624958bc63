// States: what the model knows after a text, kept on the server as a tree; each is gone on from as often as you like.

import { $, bytes, chip, h, many, sends, short } from "./dom.js";
import { ask, attempt, get, post } from "./api.js";
import { remember, visit } from "./link.js";

let chosen = null;
let from = null;

export function begin() {
  $("new-state").onsubmit = (event) => { event.preventDefault(); attempt(read); };
  $("state-text").onkeydown = (event) => { if (sends(event)) attempt(read); };
  $("upload").onclick = () => $("file").click();
  $("file").onchange = () => attempt(upload);
}

export async function show(values) {
  chosen = values.state ?? null;
  follow(values.from ?? null);
  await list();
}

const link = () => remember("states", { state: chosen, from });

function follow(id) {
  from = id;
  chip($("state-after"), id, () => follow(null));
  link();
}

async function read() {
  const made = await post("/v1/states", { prompt: $("state-text").value, ...(from && { from }) });
  $("state-text").value = "";
  chosen = made.id;
  follow(null);
  await list(`read ${many(made.tokens, "token")}`);
}

async function upload() {
  const file = $("file").files[0];
  $("file").value = "";
  if (!file) return;
  chosen = (await (await ask("PUT", "/v1/states", file)).json()).id;
  link();
  await list(`took in ${file.name}`);
}

async function download(id) {
  const file = await (await ask("GET", `/v1/states/${id}/content`)).blob();
  const anchor = h("a", { href: URL.createObjectURL(file), download: `${id}.safetensors` });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 60_000);
}

async function fork(id) {
  chosen = (await post(`/v1/states/${id}/fork`, { copies: 1 })).data[0].id;
  link();
  await list("forked, which costs no memory");
}

async function remove(id) {
  await ask("DELETE", `/v1/states/${id}`);
  if (chosen === id) chosen = null;
  if (from === id) follow(null);
  link();
  await list("deleted");
}

async function list(news = "") {
  const found = await get("/v1/states");
  const below = new Map();
  const known = new Set(found.data.map((each) => each.id));
  for (const each of found.data) {
    const parent = known.has(each.parent) ? each.parent : null;
    below.set(parent, [...(below.get(parent) ?? []), each]);
  }
  const branch = (parent) => (below.get(parent) ?? []).map((each) => node(each, branch));
  $("tree").replaceChildren(...branch(null));
  if (!known.size) $("tree").append(h("li", { className: "soft none" }, "No states yet. Read a text above, or keep one while you write."));
  const sum = known.size ? `${many(known.size, "state")}, ${bytes(found.bytes)} of ${bytes(found.limit)}` : "";
  $("states-told").textContent = [news, sum].filter(Boolean).join(" · ");
  $("tree").querySelector(".chosen")?.scrollIntoView({ block: "nearest" });
}

function node(state, branch) {
  const minutes = Math.max(1, Math.round((state.expires_at - Date.now() / 1000) / 60));
  const name = `state ${short(state.id)}`;
  const act = (label, work) => h("button", { className: "quiet", "aria-label": `${label} ${name}`, onclick: () => attempt(work) }, label);
  const children = branch(state.id);
  const item = h("li", { id: state.id },
    h("div", { className: state.id === chosen ? "node chosen" : "node" },
      h("p", { className: "tail" }, state.text ? h("span", { className: "prose" }, `…${state.text}`) : name),
      h("p", { className: "soft" }, [short(state.id), many(state.tokens, "token"), bytes(state.bytes), `kept ${many(minutes, "minute")} more`].join(" · ")),
      h("div", { className: "bar", role: "group", "aria-label": name },
        act("Continue", () => visit("write", { state: state.id })),
        act("Read on", () => { chosen = state.id; follow(state.id); mark(); $("state-text").focus(); }),
        act("Fork", () => fork(state.id)),
        act("Download", () => download(state.id)),
        act("Delete", () => remove(state.id)))));
  if (children.length) item.append(h("ul", {}, ...children));
  return item;
}

function mark() {
  for (const each of $("tree").querySelectorAll("li[id]")) each.firstElementChild.classList.toggle("chosen", each.id === chosen);
}
