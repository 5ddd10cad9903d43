// Two answers to one prompt, side by side; the models' names come with the answer to the vote.

import { byId, element, fail, json, reason, Refused, sampling, sendOnEnter, shortcuts, speaker, stream, systemTurn, told } from "./common.js";

const SIDES = ["left", "right"];
const [form, prompt] = [byId("ask"), byId("prompt")];
const wins = new Map(); // model -> number of votes for it
let ties = 0;
let current = null; // { comparison, messages, left, right }: both answers are there, and no vote is
let stopping = null;

function voting(isOpen) {
  for (const side of [...SIDES, "tie"]) byId(`vote-${side}`).disabled = !isOpen;
}

function voted(isVoted) {
  for (const side of [...SIDES, "tie"]) byId(`vote-${side}`).hidden = isVoted;
  byId("next").hidden = !isVoted;
}

function clear() {
  for (const side of SIDES) {
    const article = byId(side);
    article.classList.remove("best");
    article.querySelector(".text").textContent = "";
    article.querySelector(".note").textContent = "";
  }
  byId("left-name").textContent = "Answer 1";
  byId("right-name").textContent = "Answer 2";
  byId("revealed").textContent = "";
  voted(false);
  fail("");
}

async function ask(event) {
  event.preventDefault();
  const content = prompt.value;
  if (stopping || prompt.readOnly || !content.trim()) return;
  clear();
  const asked = { comparison: randomId(), messages: [...systemTurn(), { role: "user", content }] };
  stopping = new AbortController();
  prompt.readOnly = true;
  byId("stop").hidden = false;
  byId("both").hidden = byId("hint").hidden = true;
  byId("answers").hidden = false;
  byId("answers").focus();
  try {
    const [left, right] = await Promise.all(SIDES.map((side) => answer(side, asked, stopping.signal)));
    current = { ...asked, left, right };
    voting(true);
    byId("spoken").append(element("p", "", "Both answers are there. Which is better?"));
  } catch (error) {
    stopping.abort(); // one answer alone is of no use
    fail(reason(error) || "Stopped.");
    again();
  }
  stopping = null;
  byId("stop").hidden = true;
}

// A random id of version 4; `crypto.randomUUID` is there for https and for this machine only.
function randomId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function answer(side, asked, signal) {
  const article = byId(side);
  const text = article.querySelector(".text").appendChild(new Text());
  const spoken = speaker();
  article.classList.add("writes");
  article.setAttribute("aria-busy", "true");
  try {
    const body = { ...asked, side, ...sampling() };
    const found = await stream("/compare/stream", body, signal, (piece) => text.appendData(piece));
    // Speed could tell the models apart.
    article.querySelector(".note").textContent = told({ ...found, usage: null, firstMs: null });
    spoken.add(`Answer ${side === "left" ? 1 : 2}: ${text.data}`);
    spoken.end();
    return text.data;
  } finally {
    article.classList.remove("writes");
    article.removeAttribute("aria-busy");
  }
}

async function vote(preferred) {
  if (!current) return;
  voting(false);
  fail("");
  try {
    reveal(preferred, await json("/compare/vote", { body: { ...current, preferred } }));
    current = null;
    voted(true);
    byId("next").focus();
  } catch (error) {
    fail(reason(error));
    voting(true);
    byId("next").hidden = !(error instanceof Refused); // it may never be taken
    byId(`vote-${preferred}`).focus();
  }
}

function reveal(preferred, { left_model: left, right_model: right }) {
  const models = { left, right };
  for (const side of SIDES) {
    byId(`${side}-name`).textContent = `Answer ${side === "left" ? 1 : 2}: ${models[side]}`;
    byId(side).classList.toggle("best", side === preferred);
    wins.set(models[side], (wins.get(models[side]) ?? 0) + (side === preferred));
  }
  ties += preferred === "tie";
  const verdict = preferred === "tie" ? "A tie." : `${models[preferred]} wins.`;
  byId("revealed").textContent = `${verdict} 1 is ${left}, 2 is ${right}.`;
  const rows = [...[...wins].sort(([a], [b]) => (a < b ? -1 : 1)), ["Ties", ties]];
  byId("tally").tBodies[0].replaceChildren(...rows.map(([name, num]) => {
    const row = element("tr");
    const head = element("th", "", name);
    head.scope = "row";
    row.append(head, element("td", "", String(num)));
    return row;
  }));
  byId("tally").hidden = false;
}

// The same prompt may be asked again.
function again() {
  current = null;
  voting(false);
  prompt.readOnly = false;
  byId("both").hidden = byId("hint").hidden = false;
  prompt.focus();
}

function next() {
  clear();
  byId("answers").hidden = true;
  prompt.value = "";
  again();
}

form.addEventListener("submit", ask);
sendOnEnter(prompt);
for (const side of [...SIDES, "tie"]) byId(`vote-${side}`).addEventListener("click", () => vote(side));
byId("stop").addEventListener("click", () => stopping?.abort());
byId("next").addEventListener("click", next);
shortcuts({ 1: "vote-left", 2: "vote-right", t: "vote-tie", n: "next" });
prompt.focus();
