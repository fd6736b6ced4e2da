// The chat page: plain modules, no build step, nothing from elsewhere.
// What a model writes is only ever set as textContent, so it can show anything and run nothing.

// ---------------------------------------------------------------- from bytes to events

// Server-sent events arrive as bytes cut at arbitrary places: in the middle of a line, or of a
// letter. One decoder lives as long as the stream and keeps the rest of a letter; `line` keeps
// the rest of a line.
export class EventReader {
  decoder = new TextDecoder();
  line = "";

  // Takes a piece of the stream, gives the payloads of the events that became complete.
  push(bytes) {
    const lines = (this.line + this.decoder.decode(bytes, { stream: true })).split("\n");
    this.line = lines.pop();
    return lines
      .filter((line) => line.startsWith("data:"))
      .map((line) => line.slice(5).trim());
  }
}

// ---------------------------------------------------------------- from text to the page

// Text → blocks: paragraphs and fenced code. A fence that is still open ends with the text.
export function blocksOf(text) {
  const blocks = [];
  let block = null;
  for (const line of text.split("\n")) {
    const fence = line.match(/^\s*```\s*([\w+#.-]*)\s*$/);
    if (block?.kind === "code" && fence && !fence[1]) {
      block = null;
    } else if (block?.kind !== "code" && fence) {
      blocks.push((block = { kind: "code", language: fence[1], lines: [] }));
    } else {
      if (!block) blocks.push((block = { kind: "text", lines: [] }));
      block.lines.push(line);
    }
  }
  return blocks.map(({ lines, ...rest }) => ({ ...rest, text: lines.join("\n") }));
}

// A reply's parts → blocks; a calculator call and its result become one chip within the text.
export function blocksOfParts(parts) {
  const blocks = [];
  for (const part of parts) {
    if (part.type === "text") {
      blocks.push(...blocksOf(part.text));
    } else if (part.type === "python") {
      blocks.push({ kind: "tool", text: part.text, result: null });
    } else if (blocks.at(-1)?.kind === "tool") {
      blocks.at(-1).result = part.text;
    }
  }
  blocks.forEach((block, i) => { // empty lines show only between words
    if (block.kind !== "text") return;
    if (i === 0 || blocks[i - 1].kind === "code") block.text = block.text.replace(/^\n+/, "");
    if (i === blocks.length - 1 || blocks[i + 1].kind === "code") block.text = block.text.trimEnd();
  });
  return blocks.filter((block) => block.kind !== "text" || block.text);
}

function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.textContent = text;
  return node;
}

function button(label, onClick) {
  const node = element("button", "", label);
  node.type = "button";
  node.addEventListener("click", onClick);
  return node;
}

const makers = {
  text: () => element("span", "text"),
  code() {
    const node = element("div", "code"), bar = element("div"), code = element("code");
    const pre = element("pre");
    pre.tabIndex = 0; // so that a long line can be scrolled with the keyboard
    pre.append(code);
    bar.append(element("span"), button("Copy", (event) => copy(code.textContent, event.target)));
    node.append(bar, pre);
    return node;
  },
  tool() {
    const node = element("span", "tool");
    node.append(element("span", "", "calculator"), element("code"), element("span", "", ""), element("code"));
    return node;
  },
};

const fillers = {
  text: (node, block) => setText(node, block.text),
  code(node, block) {
    setText(node.querySelector("span"), block.language || "code");
    setText(node.querySelector("code"), block.text);
  },
  tool(node, block) {
    const [, call, arrow, result] = node.children;
    setText(call, block.text);
    setText(arrow, block.result === null ? "" : "→");
    setText(result, block.result ?? "");
  },
};

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Shows blocks in `parent`; nodes that fit are kept, so that a selection survives new words.
function showBlocks(parent, blocks) {
  blocks.forEach((block, i) => {
    let node = parent.children[i];
    if (node?.dataset.kind !== block.kind) {
      const made = makers[block.kind]();
      made.dataset.kind = block.kind;
      if (node) node.replaceWith(made);
      else parent.append(made);
      node = made;
    }
    fillers[block.kind](node, block);
  });
  while (parent.children.length > blocks.length) parent.lastChild.remove();
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", "hidden", text); // without HTTPS there is no clipboard object
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    from.focus();
  }
  const label = from.textContent;
  from.textContent = "Copied";
  say("Copied");
  setTimeout(() => (from.textContent = label), 1500);
}

// ---------------------------------------------------------------- the conversation

// A turn is a question and its reply: {user, parts, note, error, node}. Only turns with a reply
// are sent again, so a request that failed never leaves two questions in a row.
let turns = [];
let running = null; // {turn, abort} while a reply is on its way

const $ = (id) => document.getElementById(id);
const key = readKey();

// A server that others can reach prints its key as part of the address, behind the #.
function readKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  try {
    if (given) {
      sessionStorage.setItem("key", given);
      history.replaceState(null, "", location.pathname);
    }
    return sessionStorage.getItem("key") ?? "";
  } catch {
    return given ?? "";
  }
}

function headers() {
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

function say(text) {
  $("status").textContent = text;
}

function plain(parts) {
  return parts.filter((part) => part.type === "text").map((part) => part.text).join("").trim();
}

// The conversation up to a turn, newest first in choice: what exceeds the server's limits on a
// request stays behind. (A model's context is much shorter; what fits there, the server decides.)
function messagesUpTo(turn) {
  const messages = [{ role: "user", content: turn.user }];
  let room = 32_000 - turn.user.length;
  for (const { user, parts } of turns.slice(0, turns.indexOf(turn)).reverse()) {
    const reply = parts.reduce((sum, part) => sum + part.text.length, 0);
    room -= user.length + reply;
    if (room < 0 || reply > 8_000 || messages.length > 97) break;
    if (reply) messages.unshift({ role: "user", content: user }, { role: "assistant", content: parts });
  }
  return messages;
}

function addPart(parts, type, text) {
  if (type === "text" && parts.at(-1)?.type === "text") parts.at(-1).text += text;
  else if (text) parts.push({ type, text });
}

// ---------------------------------------------------------------- showing it

function makeTurn(user) {
  const turn = { user, parts: [], note: "", error: "" };
  turn.node = element("section", "turn");
  turn.reply = element("div", "reply");
  turn.remark = element("p", "note");
  turn.actions = element("div", "actions");
  const you = element("div", "you", user);
  you.setAttribute("role", "group");
  you.setAttribute("aria-label", "You");
  turn.reply.setAttribute("role", "group");
  turn.reply.setAttribute("aria-label", "Reply");
  turn.node.append(you, turn.reply, turn.remark, turn.actions);
  return turn;
}

function showTurn(turn) {
  const isRunning = running?.turn === turn;
  const following = atEnd();
  showBlocks(turn.reply, blocksOfParts(turn.parts));
  turn.reply.classList.toggle("waiting", isRunning);
  turn.remark.hidden = !(turn.note || turn.error);
  turn.remark.classList.toggle("error", Boolean(turn.error));
  setText(turn.remark, turn.error || turn.note);
  if (following) scrollToEnd();
}

function showActions() {
  for (const turn of turns) {
    const actions = [];
    if (running?.turn !== turn) {
      if (plain(turn.parts)) actions.push(button("Copy", (event) => copy(plain(turn.parts), event.target)));
      if (turn === turns.at(-1) && !running)
        actions.push(button(turn.parts.length ? "Regenerate" : "Try again", () => run(turn)));
    }
    turn.actions.replaceChildren(...actions);
  }
  $("welcome").hidden = turns.length > 0;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !$("text").value.trim();
}

function atEnd() {
  const box = $("scroller");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}

function scrollToEnd() {
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

function grow() {
  const box = $("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  $("send").disabled = !box.value.trim();
}

// ---------------------------------------------------------------- asking

class Refused extends Error {}

async function* askServer(messages, signal) {
  let response;
  try {
    response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), signal, body: JSON.stringify({ messages, stream: true }),
    });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Refused(body?.error?.message ?? `The server answered with status ${response.status}.`);
  }
  const reader = response.body.getReader(), events = new EventReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    for (const payload of events.push(value)) {
      if (payload === "[DONE]") return;
      yield JSON.parse(payload);
    }
  }
}

async function run(turn) {
  stop();
  const me = (running = { turn, abort: new AbortController() });
  Object.assign(turn, { parts: [], note: "", error: "" });
  let frame = 0, finished = "";
  const paint = () => (frame ||= requestAnimationFrame(() => ((frame = 0), showTurn(turn))));
  say("Writing a reply");
  showTurn(turn);
  showActions();
  scrollToEnd();
  try {
    for await (const chunk of askServer(messagesUpTo(turn), me.abort.signal)) {
      if (chunk.error) throw new Refused(chunk.error.message);
      if (chunk.dropped_turns) turn.note = "The oldest messages no longer fit and were left out.";
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      finished = choice.finish_reason ?? finished;
      if (choice.delta.content) addPart(turn.parts, "text", choice.delta.content);
      if (choice.delta.tool) addPart(turn.parts, choice.delta.tool.type, choice.delta.tool.text);
      paint();
    }
    if (finished === "length") turn.note = "The reply was cut at its limit.";
    else if (!finished) turn.error = "The connection was interrupted; this is what had arrived.";
    else if (!turn.parts.length) turn.note = "The model had nothing to say.";
  } catch (error) {
    if (me.abort.signal.aborted) turn.note = "Stopped.";
    else if (error instanceof Refused) turn.error = error.message;
    else turn.error = "The connection was interrupted; this is what had arrived.";
  }
  if (running === me) running = null;
  cancelAnimationFrame(frame);
  showTurn(turn);
  showActions();
  say(turn.error || turn.note || `Reply complete. ${plain(turn.parts)}`);
}

function stop() {
  running?.abort.abort();
  running = null;
}

function send() {
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  grow();
  const turn = makeTurn(text);
  turns.push(turn);
  $("log").append(turn.node);
  run(turn);
}

function newChat() {
  stop();
  turns = [];
  $("log").replaceChildren();
  $("down").hidden = true;
  showActions();
  say("New chat");
  $("text").focus();
}

async function showModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    const model = (await response.json()).data[0];
    const millions = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
    $("model").textContent = document.title = model.id;
    $("facts").textContent = [
      model.parameters && `${millions.format(model.parameters / 1e6)} million parameters`,
      model.step !== undefined && `step ${model.step}`,
      model.device,
    ].filter(Boolean).join(" · ");
  } catch {
    $("facts").textContent = "";
  }
}

$("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  const composing = event.isComposing || event.keyCode === 229; // Enter that picks a word of an IME
  if (event.key === "Enter" && !event.shiftKey && !composing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) $("stop").click();
});
$("stop").addEventListener("click", () => (running?.abort.abort(), $("text").focus()));
$("new").addEventListener("click", newChat);
$("down").addEventListener("click", scrollToEnd);
$("scroller").addEventListener("scroll", () => ($("down").hidden = atEnd()));
for (const idea of $("ideas").querySelectorAll("button")) {
  idea.addEventListener("click", () => (($("text").value = idea.textContent), send(), $("text").focus()));
}
showModel();
showActions();
if (matchMedia("(pointer: fine)").matches) $("text").focus(); // on a phone it would open the keyboard
