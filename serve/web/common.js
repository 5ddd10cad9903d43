// What the pages share: the API key, requests, streams, and what is said to the reader.
// Text of people and models is only ever set as text.

export const byId = (id) => document.getElementById(id);

export function element(kind, className, text) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// The API key: in this tab, until it is closed.

const KEY = "dpo-ray-key";

let asking = null;

// Resolves to true where there is a new key to try. Requests that are refused at the same time share one question.
function askForKey(why) {
  asking ??= keyDialog(why).finally(() => { asking = null; });
  return asking;
}

function keyDialog(why) {
  const dialog = element("dialog");
  const form = element("form");
  const title = element("h2", "", "API key");
  const said = element("p", "muted", why);
  const label = element("label", "", "Key");
  const input = element("input");
  const row = element("div", "row");
  const cancel = element("button", "", "Cancel");
  const use = element("button", "main", "Use");
  title.id = "key-title";
  said.id = "key-why";
  label.htmlFor = input.id = "key-value";
  Object.assign(input, { type: "password", autocomplete: "off", value: sessionStorage.getItem(KEY) ?? "" });
  cancel.type = "button";
  dialog.setAttribute("aria-labelledby", title.id);
  dialog.setAttribute("aria-describedby", said.id);
  row.append(cancel, use);
  form.append(title, said, label, input, row);
  dialog.append(form);
  document.body.append(dialog);
  return new Promise((resolve) => {
    let isUsed = false;
    cancel.addEventListener("click", () => dialog.close());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      isUsed = true;
      const key = input.value.trim();
      if (key) sessionStorage.setItem(KEY, key);
      else sessionStorage.removeItem(KEY);
      dialog.close();
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(isUsed);
    });
    dialog.showModal();
    input.select();
  });
}

byId("key").addEventListener("click", async () => {
  const isNew = await askForKey("It is kept in this tab only. Leave it empty to forget it.");
  if (isNew) document.dispatchEvent(new Event("key-change"));
});

// Requests

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// A response that is fine, or an exception: `Refused` with the server's own words, or that of `fetch`.
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { Accept: "application/json, text/event-stream" };
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
    if (response.ok) return response;
    const message = await refusal(response);
    const isNew = sessionStorage.getItem(KEY) !== key; // given while this request was under way
    const why = key ? "The key was not accepted." : "This server asks for an API key.";
    if (response.status === 401 && (isNew || (await askForKey(why)))) continue;
    throw new Refused(response.status, message);
  }
}

async function refusal(response) {
  const wait = response.headers.get("Retry-After");
  const later = wait ? ` Try again in ${wait} s.` : "";
  try {
    const { error } = await response.json();
    if (error?.message) return error.message + later;
  } catch {
    // Not ours: a proxy's page, perhaps.
  }
  return `The server answered ${response.status}.${later}`;
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

// What went wrong, in words; nothing where the reader stopped it.
export function reason(error) {
  if (error.name === "AbortError") return "";
  return error instanceof Refused ? error.message : `The server cannot be reached. (${error.message})`;
}

// Streams

// The trees of a stream of server-sent events, up to its end. One that breaks off is an error.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refused(0, "The answer broke off.");
      const parts = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Stream an answer into `onText`; returns what is known of it at its end.
export async function stream(path, body, signal, onText) {
  const begun = performance.now();
  const found = { finish: null, usage: null, firstMs: null, totalMs: 0 };
  for await (const tree of events(await request(path, { body, signal }))) {
    if (tree.error) throw new Refused(0, tree.error.message);
    if (tree.usage) found.usage = tree.usage;
    for (const choice of tree.choices ?? []) {
      if (choice.delta?.content) {
        found.firstMs ??= performance.now() - begun;
        onText(choice.delta.content);
      }
      if (choice.finish_reason) found.finish = choice.finish_reason;
    }
  }
  found.totalMs = performance.now() - begun;
  return found;
}

// The line below an answer.
export function told({ finish, usage, firstMs, totalMs }) {
  const parts = [];
  if (finish === "length") parts.push("cut at the limit");
  if (usage) {
    const { completion_tokens: num, prompt_tokens: before } = usage;
    parts.push(`${before} tokens in, ${num} out`);
    parts.push(`${((1000 * num) / totalMs).toFixed(1)} tokens/s`);
  }
  if (firstMs !== null) parts.push(`first after ${(firstMs / 1000).toFixed(2)} s`);
  return parts.join(" \u00b7 ");
}

// What the reader is told

let hiding;

export function toast(text) {
  byId("toast").textContent = text;
  clearTimeout(hiding);
  hiding = setTimeout(() => { byId("toast").textContent = ""; }, 4000);
}

export function fail(text) {
  byId("error").textContent = text;
}

// Text that streams is read aloud in whole sentences, and not more often than every two seconds.
export function speaker() {
  let waiting = "";
  let last = performance.now();
  const speak = (text) => {
    waiting = waiting.slice(text.length);
    last = performance.now();
    if (!text.trim()) return;
    byId("spoken").append(element("p", "", text));
    while (byId("spoken").childElementCount > 20) byId("spoken").firstElementChild.remove();
  };
  return {
    add(text) {
      waiting += text;
      if (performance.now() - last < 2000) return;
      const [sentences] = waiting.match(/^[^]*[.!?\n](?=\s|$)/) ?? [""];
      if (sentences) speak(sentences);
    },
    end() { speak(waiting); },
  };
}

// Keys

// Keys that stand for buttons: neither while somebody writes, nor held down, nor with Ctrl and its like.
export function shortcuts(buttons) {
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (document.querySelector("dialog[open]") || event.target.closest?.("input, select, textarea:not([readonly])")) return;
    const button = byId(buttons[event.key.toLowerCase()]);
    if (!button || button.disabled || button.hidden || button.closest("[hidden]")) return;
    event.preventDefault();
    button.click();
  });
}

// Enter sends a form; Shift+Enter is a new line. Enter also ends a word of an input method, and screen keyboards have no
// other key for a new line.
export function sendOnEnter(textarea) {
  if (matchMedia("(pointer: coarse) and (hover: none)").matches) return;
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!event.repeat) textarea.form.requestSubmit();
  });
}

// What the settings of a page say, as parts of a request.

export function sampling() {
  const [temperature, limit] = [byId("temperature").valueAsNumber, byId("max-tokens").valueAsNumber];
  return {
    ...(Number.isNaN(temperature) ? {} : { temperature }),
    ...(Number.isNaN(limit) ? {} : { max_tokens: limit }),
  };
}

export function systemTurn() {
  const content = byId("system").value.trim();
  return content ? [{ role: "system", content }] : [];
}
