// A conversation with a model. It lives in this tab only.

import { byId, element, fail, json, reason, sampling, sendOnEnter, speaker, stream, systemTurn, toast, told } from "./common.js";

const turns = []; // { role, content, note }
let stopping = null; // the controller of the answer that is being written

const [log, message] = [byId("log"), byId("message")];

function shown(turn) {
  const article = element("article", `turn ${turn.role}`);
  const name = turn.role === "user" ? "You" : turn.model;
  article.append(element("h2", "", name), element("div", "text", turn.content));
  if (turn.role === "assistant") article.append(element("div", "row"));
  return article;
}

function tool(text, act) {
  const button = element("button", "small", text);
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

function draw() {
  log.replaceChildren(...turns.map(shown));
  turns.forEach((turn, i) => {
    if (turn.role !== "assistant") return;
    const row = log.children[i].querySelector(".row");
    row.append(tool("Copy", () => copy(turn.content, log.children[i])));
    if (i === turns.length - 1) row.append(tool("Retry", retry));
    row.append(element("p", "note", turn.note));
  });
}

async function copy(text, article) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied.");
  } catch {
    // Browsers give the clipboard to pages of https and of this machine only.
    getSelection().selectAllChildren(article.querySelector(".text"));
    toast("Marked: copy it with Ctrl+C.");
  }
}

function working(isWorking) {
  byId("stop").hidden = !isWorking;
  byId("send").hidden = isWorking;
  byId("clear").disabled = isWorking;
  for (const button of log.querySelectorAll("button")) button.disabled = isWorking;
}

const isAtEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 60;
const toEnd = () => scrollTo(0, document.documentElement.scrollHeight);

// Answer the last turn. False: there is not a word of an answer.
async function answered() {
  const model = byId("model").value;
  const turn = { role: "assistant", content: "", model, note: "" };
  const article = shown(turn);
  const text = article.querySelector(".text").appendChild(new Text());
  const spoken = speaker();
  const body = {
    model,
    messages: [...systemTurn(), ...turns.map(({ role, content }) => ({ role, content }))],
    stream: true,
    stream_options: { include_usage: true },
    ...sampling(),
  };
  fail("");
  article.classList.add("writes");
  article.setAttribute("aria-busy", "true");
  log.append(article);
  stopping = new AbortController();
  working(true);
  toEnd();
  let isAnswered = true;
  try {
    turn.note = told(await stream("/v1/chat/completions", body, stopping.signal, (piece) => {
      const follows = isAtEnd();
      text.appendData(piece);
      spoken.add(piece);
      if (follows) toEnd();
    }));
  } catch (error) {
    turn.note = error.name === "AbortError" ? "stopped" : "broken off";
    isAnswered = text.length > 0;
    fail(reason(error));
  }
  spoken.end();
  turn.content = text.data;
  stopping = null;
  if (isAnswered) turns.push(turn);
  draw();
  working(false);
  return isAnswered;
}

async function send(event) {
  event.preventDefault();
  const content = message.value;
  if (stopping || !content.trim()) return;
  message.value = "";
  turns.push({ role: "user", content });
  draw();
  if (!(await answered())) {
    turns.pop();
    draw();
    message.value ||= content;
  }
  message.focus();
}

async function retry() {
  if (stopping) return;
  const before = turns.pop();
  draw();
  if (!(await answered())) {
    turns.push(before);
    draw();
  }
  message.focus();
}

byId("composer").addEventListener("submit", send);
sendOnEnter(message);
byId("stop").addEventListener("click", () => {
  stopping?.abort();
  message.focus();
});
byId("clear").addEventListener("click", () => {
  turns.length = 0;
  draw();
  fail("");
  message.focus();
});

async function findModels() {
  fail("");
  try {
    const { data } = await json("/v1/models");
    byId("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
  } catch (error) {
    fail(reason(error));
  }
  message.focus();
}

document.addEventListener("key-change", findModels);
findModels();
