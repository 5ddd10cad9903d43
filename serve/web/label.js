// Pairs of the queue, one after the other. The queue counts a label once, however often it is sent.

import { byId, element, fail, json, reason, Refused, shortcuts, toast } from "./common.js";

const NAME = "dpo-ray-person";
const LOOK_AGAIN_MS = 5000;
const BUTTONS = ["say-left", "say-tie", "say-right", "skip", "undo"];

let person = "";
let task = null;
let isBusy = false;
let looking;

// One request at a time; the buttons wait with it.
async function alone(work) {
  if (isBusy) return;
  isBusy = true;
  clearTimeout(looking);
  enable();
  try {
    await work();
  } finally {
    isBusy = false;
    enable();
    if (!task && person) looking = setTimeout(look, LOOK_AGAIN_MS);
  }
}

function enable() {
  for (const id of BUTTONS) byId(id).disabled = isBusy || (!task && id !== "undo");
}

// In a tab that nobody sees a pair would lie in nobody's hand.
function look() {
  if (document.hidden) looking = setTimeout(look, LOOK_AGAIN_MS);
  else alone(take);
}

async function take() {
  try {
    show(await json(`/label/task?${new URLSearchParams({ person })}`));
  } catch (error) {
    fail(reason(error));
    return;
  }
  if (byId("agreement").open) await agreement();
}

function show({ task: given, progress, mine }) {
  const isNew = given && given.id !== task?.id;
  task = given;
  byId("work").hidden = byId("says").hidden = byId("agreement").hidden = false;
  byId("done").max = Math.max(progress.total, 1);
  byId("done").value = progress.done;
  byId("counts").textContent =
    `${progress.done} of ${progress.total} done, ${progress.leased} in hand, ${mine} by you`;
  byId("task").hidden = !task;
  byId("until").textContent = task ? `Kept for you until ${time(task.until)}.` : "";
  const isOver = progress.total > 0 && progress.done === progress.total;
  const idle = isOver ? "All pairs are done." : "There is nothing for you to label now. The page looks again every 5 seconds.";
  if (byId("idle").textContent !== (task ? "" : idle)) byId("idle").textContent = task ? "" : idle;
  if (!isNew) return;
  byId("prompt").replaceChildren(...turns(task.prompt));
  byId("left").textContent = task.left;
  byId("right").textContent = task.right;
  scrollTo(0, 0);
  byId("task").focus({ preventScroll: true });
}

const time = (seconds) => new Date(1000 * seconds).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

function turns(prompt) {
  if (typeof prompt === "string") return [element("div", "turn text", prompt)];
  return prompt.map(({ role, content }) => {
    const article = element("article", `turn ${role}`);
    article.append(element("h3", "", role), element("div", "text", content));
    return article;
  });
}

// Tell the queue something, then take what comes next. Without an answer the pair stays: sending again does no harm.
function say(path, body, after = () => {}) {
  return alone(async () => {
    fail("");
    let refused = "";
    try {
      after(await json(path, { body: { person, ...body } }));
    } catch (error) {
      fail(reason(error));
      if (!(error instanceof Refused) || ![400, 409].includes(error.status)) return;
      refused = error.message;
    }
    await take();
    if (refused) fail(refused);
  });
}

const label = (preferred) => task && say("/label/answer", { id: task.id, preferred });

async function agreement() {
  try {
    const { labels, agreement: agreed, left_share: left } = await json("/label/progress");
    byId("people").replaceChildren(...Object.entries(labels).map(([name, num]) => {
      const row = element("tr");
      const head = element("th", "", name);
      head.scope = "row";
      row.append(head, element("td", "", String(num)));
      return row;
    }));
    const percent = (share) => `${Math.round(100 * share)} %`;
    const parts = [];
    if (agreed.num_pairs) {
      const kappa = agreed.kappa === null ? "not defined" : agreed.kappa.toFixed(2);
      const measure = agreed.measure === "cohen" ? "Cohen's" : "Fleiss'";
      parts.push(`People agree on ${percent(agreed.share)} of ${agreed.num_pairs} pairs; ${measure} kappa is ${kappa}.`);
    } else {
      parts.push("No pair has two labels yet.");
    }
    if (left !== null) parts.push(`Response 1 is preferred in ${percent(left)} of the labels that are no tie.`);
    byId("agreed").textContent = parts.join(" ");
  } catch (error) {
    fail(reason(error));
  }
}

byId("who").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = byId("person").value.trim();
  if (!name || isBusy) return;
  person = name;
  task = null;
  sessionStorage.setItem(NAME, person);
  fail("");
  alone(take);
});
byId("say-left").addEventListener("click", () => label("left"));
byId("say-right").addEventListener("click", () => label("right"));
byId("say-tie").addEventListener("click", () => label("tie"));
byId("skip").addEventListener("click", () => task && say("/label/skip", { id: task.id }));
byId("undo").addEventListener("click", () => {
  say("/label/undo", {}, ({ id }) => {
    if (id === null) toast("There is no label to take back, or it is in use already.");
  });
});
byId("agreement").addEventListener("toggle", () => byId("agreement").open && agreement());
shortcuts({ 1: "say-left", 2: "say-right", t: "say-tie", s: "skip", u: "undo" });

byId("person").value = sessionStorage.getItem(NAME) ?? "";
byId("person").focus();
try {
  await json("/label/progress"); // says at once where there is no queue
} catch (error) {
  byId("who").hidden = error.status === 404;
  fail(reason(error));
}
