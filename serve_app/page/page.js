// The page keeps nothing: pictures, questions and the key are gone with it.
"use strict";

const $ = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

class Problem extends Error {}

const key = () => $("key").value.trim();
const headers = () => (key() ? { authorization: `Bearer ${key()}` } : {});

// The message of an error response, as a sentence.
async function refusal(response) {
  if (response.status === 401) return "The server asks for an API key: enter it at the top of the page.";
  let body = {};
  try { body = await response.json(); } catch { /* no JSON: the status has to do */ }
  const message = body.error?.message ?? body.message ?? response.statusText;
  return `The server answers ${response.status}: ${message}`;
}

// ---- the model

let model = null;

async function findModel() {
  model = null;
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) $("key-row").hidden = false;
    if (!response.ok) throw new Problem(await refusal(response));
    const found = (await response.json()).data[0];
    model = found.id;
    $("model").textContent = `Model: ${model}, ${found.max_model_len} tokens`;
  } catch (error) {
    $("model").textContent = error instanceof Problem ? error.message : "The server does not answer.";
  }
}

// ---- what the question is about

const items = []; // {kind, name, url}: url is a data: URL

function addItem(kind, name, url) {
  const item = { kind, name, url };
  items.push(item);
  const view = kind === "image" ? make("img", { src: url, alt: name }) : make("span", { textContent: kind });
  const remove = make("button", { type: "button", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove ${name}`);
  const row = make("li", {}, view, make("div", { textContent: name }), remove);
  remove.addEventListener("click", () => {
    items.splice(items.indexOf(item), 1);
    row.remove();
    $("files").focus();
  });
  $("items").append(row);
}

function addFiles(files) {
  for (const file of files) {
    const kind = file.type.split("/")[0];
    if (!["image", "audio", "video"].includes(kind)) {
      $("problem").textContent = `${file.name} is no image, audio or video.`;
      continue;
    }
    const reader = new FileReader();
    reader.addEventListener("load", () => addItem(kind, file.name, reader.result));
    reader.addEventListener("error", () => { $("problem").textContent = `${file.name} cannot be read.`; });
    reader.readAsDataURL(file);
  }
}

$("files").addEventListener("change", (event) => {
  addFiles(event.target.files);
  event.target.value = "";
});
document.addEventListener("paste", (event) => addFiles(event.clipboardData.files));
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return; // text may go into the question
    event.preventDefault(); // else the browser would open the file
    $("drop").classList.toggle("over", over);
    if (name === "drop") addFiles(event.dataTransfer.files);
  });
}

// ---- drawing

// The colours of serve_app/demo/drawing.py, which the demo model has seen.
const COLOURS = {
  red: "#e02020", orange: "#f58a10", yellow: "#f5d90a", green: "#1f9d3a",
  blue: "#2050d8", purple: "#8a2fc0", pink: "#f58cc0", black: "#202020",
};
const GROUNDS = { white: "#ffffff", "light grey": "#d0d0d0", ...COLOURS };

// Each figure lies within a circle of radius r.
const SHAPES = {
  circle: (path, r) => path.arc(0, 0, r, 0, 2 * Math.PI),
  square: (path, r) => polygon(path, [r, r, r, r], -Math.PI / 4),
  triangle: (path, r) => polygon(path, [r, r, r]),
  star: (path, r) => polygon(path, Array.from({ length: 10 }, (_, corner) => (corner % 2 ? 0.45 * r : r))),
};
const PLACES = ["top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"];
const ARROWS = "↖↑↗←•→↙↓↘";

const canvas = $("canvas");
const figures = []; // {shape, colour, x, y, r}

function polygon(path, radii, start = -Math.PI / 2) {
  radii.forEach((radius, corner) => {
    const angle = start + (2 * Math.PI * corner) / radii.length;
    path.lineTo(radius * Math.cos(angle), radius * Math.sin(angle));
  });
  path.closePath();
}

function choice(name) {
  return document.querySelector(`input[name=${name}]:checked`).value;
}

const radius = () => $("size").value * canvas.width;

function whereIs({ x, y }) {
  const third = (value) => Math.min(2, Math.floor((3 * value) / canvas.width));
  return PLACES[3 * third(y) + third(x)];
}

function redraw(said = "") {
  const pen = canvas.getContext("2d");
  pen.fillStyle = GROUNDS[$("background").value];
  pen.fillRect(0, 0, canvas.width, canvas.height);
  for (const { shape, colour, x, y, r } of figures) {
    pen.save();
    pen.translate(x, y);
    pen.beginPath();
    SHAPES[shape](pen, r);
    pen.fillStyle = COLOURS[colour];
    pen.fill();
    pen.restore();
  }
  const what = figures.map((figure) => `${figure.colour} ${figure.shape}, ${whereIs(figure)}`).join("; ") || "nothing yet";
  canvas.setAttribute("aria-label", `Drawing on ${$("background").value}: ${what}`);
  $("undo").disabled = $("clear").disabled = !figures.length;
  $("drawn").textContent = said;
}

function place(x, y, r = radius()) {
  const figure = { shape: choice("shape"), colour: choice("colour"), x, y, r };
  figures.push(figure);
  redraw(`A ${figure.colour} ${figure.shape} is placed, ${whereIs(figure)}.`);
  return figure;
}

function clearDrawing(said) {
  figures.length = 0;
  redraw(said);
}

function addDrawing() {
  const parts = figures.map(({ colour, shape }) => `${colour} ${shape}`).join(", ") || "empty";
  addItem("image", `drawing: ${parts}`, canvas.toDataURL("image/png"));
  clearDrawing("The picture is added.");
}

function onCanvas(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  const figure = place(...onCanvas(event));
  const usual = figure.r;
  const drag = (move) => {
    const [x, y] = onCanvas(move);
    const reach = Math.hypot(x - figure.x, y - figure.y);
    figure.r = reach < 6 ? usual : Math.min(reach, canvas.width / 2);
    redraw();
  };
  canvas.addEventListener("pointermove", drag);
  canvas.addEventListener("lostpointercapture", () => canvas.removeEventListener("pointermove", drag), { once: true });
});

function radios(name, values) {
  values.forEach((value, index) => {
    const input = make("input", { type: "radio", name, value, checked: !index });
    const label = make("label", {}, input);
    if (name === "colour") {
      const swatch = make("span", { className: "swatch" });
      swatch.style.background = COLOURS[value];
      label.append(swatch);
    }
    label.append(value);
    $(`${name}s`).append(label);
  });
}

function setUpDrawing() {
  radios("shape", Object.keys(SHAPES));
  radios("colour", Object.keys(COLOURS));
  $("background").append(...Object.keys(GROUNDS).map((name) => make("option", { textContent: name })));
  const grid = make("div");
  PLACES.forEach((name, index) => {
    const button = make("button", { type: "button", textContent: ARROWS[index] });
    button.setAttribute("aria-label", `Place it ${name}`);
    const at = (column) => { // keeps the figure inside the picture if it fits
      const edge = Math.min(radius() + 4, canvas.width / 2);
      return Math.min(Math.max((0.24 + 0.26 * column) * canvas.width, edge), canvas.width - edge);
    };
    button.addEventListener("click", () => place(at(index % 3), at(Math.floor(index / 3))));
    grid.append(button);
  });
  $("places").append(grid);
  $("background").addEventListener("change", () => redraw());
  $("undo").addEventListener("click", () => { figures.pop(); redraw("The last figure is gone."); });
  $("clear").addEventListener("click", () => clearDrawing("The drawing is empty."));
  $("add").addEventListener("click", addDrawing);
  redraw();
}

// ---- asking

let asking = null; // aborts the request under way

// Yields the events of a stream as they come. Comments and other fields are ignored.
async function* events(body) {
  let text = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Problem("The answer broke off.");
    text += value;
    const whole = text.split(/\r?\n\r?\n/);
    text = whole.pop();
    for (const event of whole) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function message() {
  const parts = items.map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } }));
  return [{ role: "user", content: [...parts, { type: "text", text: $("question").value }] }];
}

async function ask() {
  if (figures.length) addDrawing();
  if (model === null) await findModel();
  if (model === null) throw new Problem($("model").textContent);
  const body = { model, messages: message(), max_tokens: Number($("max-tokens").value), temperature: 0, stream: true };
  const began = performance.now();
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal: asking.signal,
  });
  if (response.status === 401) $("key-row").hidden = false;
  if (!response.ok) throw new Problem(await refusal(response));
  const first = performance.now();
  const draw = () => showWaterfall(response.headers, first - began, performance.now() - first);
  draw();
  try {
    for await (const event of events(response.body)) {
      if (event.error) throw new Problem(`The answer broke off: ${event.error.message}`);
      const delta = event.choices?.[0]?.delta ?? {};
      const thought = delta.reasoning ?? delta.reasoning_content;
      if (thought) {
        $("thinking").hidden = false;
        $("thinking").append(thought);
      }
      if (delta.content) $("answer").append(delta.content);
    }
  } finally {
    draw();
  }
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (asking) return;
  asking = new AbortController();
  for (const id of ["answer", "thinking", "problem"]) $(id).textContent = "";
  $("thinking").hidden = $("waterfall").hidden = true;
  $("send").disabled = true;
  $("stop").hidden = false;
  $("answer").setAttribute("aria-busy", "true"); // screen readers wait for the whole answer
  try {
    await ask();
  } catch (error) {
    if (error instanceof Problem) $("problem").textContent = error.message;
    else if (error.name === "AbortError") $("problem").textContent = "Stopped.";
    else $("problem").textContent = `The server does not answer, or the connection is lost (${error.message}).`;
  } finally {
    asking = null;
    $("answer").setAttribute("aria-busy", "false");
    $("send").disabled = false;
    $("stop").hidden = true;
    look();
  }
});
$("stop").addEventListener("click", () => asking?.abort());
$("key").addEventListener("change", findModel);
$("key-row").addEventListener("submit", (event) => event.preventDefault()); // Enter is a change too

// ---- the request's own waterfall

const STEPS = {
  render: ["Render", "work"], queue: ["Queue", "wait"], encode: ["Encode", "work"], ec_transfer: ["EC transfer", "move"],
  prefill: ["Prefill", "work"], kv_transfer: ["KV transfer", "move"], first_token: ["Decode: first token", "work"],
  rest: ["Decode: the rest", "work"],
};

// Reads the header like `python -m serve_app ask --timing`. A name with a dot is one item of a step; items overlap.
function showWaterfall(told, waitMs, restMs) {
  const found = [...(told.get("server-timing") ?? "").matchAll(/([\w.]+);dur=([\d.]+)(?:;desc="([^"]*)")?/g)];
  const timed = found.map(([, name, ms, who]) => ({ name, ms: Number(ms), who: who ?? "" }));
  let steps = timed.filter(({ name }) => !name.includes("."));
  if (!steps.length) steps = [{ name: "first_token", ms: waitMs, who: "" }];
  const decoder = steps.find(({ name }) => name === "first_token")?.who ?? "";
  steps.push({ name: "rest", ms: restMs, who: decoder });
  const total = steps.reduce((sum, { ms }) => sum + ms, 0) || 1;
  let before = 0;
  const rows = steps.flatMap((step) => {
    const own = timed.filter(({ name }) => name.startsWith(`${step.name}.`));
    const start = before;
    before += step.ms;
    return (own.length ? own : [step]).map(({ name, ms, who }) => {
      const [label, kind] = STEPS[step.name] ?? [step.name, "work"];
      const item = name.split(".")[1];
      const bar = make("div", { className: `span ${kind}` });
      bar.style.marginLeft = `${(100 * start) / total}%`;
      bar.style.width = `${(100 * ms) / total}%`;
      return make("tr", {},
        make("th", { scope: "row", textContent: item ? `${label} item ${item}` : label }),
        make("td", { className: "ms", textContent: ms.toFixed(ms < 1 ? 2 : 1) }),
        make("td", { className: "track" }, bar),
        make("td", { className: "who", textContent: who }));
    });
  });
  $("steps").replaceChildren(...rows);
  const [cached, prompt] = (told.get("x-epd-cached-tokens") ?? "").split("/");
  $("cached").textContent = prompt ? `${cached} of ${prompt} prompt tokens were in a cache.` : "";
  const rungs = told.get("x-epd-rungs");
  $("rungs").textContent = rungs ? `Failed and done otherwise: ${rungs}` : "";
  $("waterfall").hidden = false;
  worked = new Set(timed.flatMap(({ who }) => who.split(" ").filter(Boolean)));
}

// ---- the stages

let worked = new Set(); // replicas that worked on the last request
const ingresses = new Map(); // any one of them answers a look
const before = new Map(); // the last summary of each stage

const plural = (count, what) => `${Math.round(count)} ${Math.round(count) === 1 ? what.replace(/s$/, "") : what}`;

function loadOf(load, unit) {
  const lines = [plural(load.calls, load.rate === undefined ? unit : "calls")];
  let share = load.slots && unit === "sequences" ? load.outstanding / load.slots : 0;
  if (load.rate !== undefined) {
    if (unit !== "sequences") lines.push(plural(load.outstanding, unit)); // each sequence is a call
    if (load.rate && load.outstanding && unit !== "sequences") {
      share = load.outstanding / load.rate;
      lines.push(`${share.toFixed(2)} s of work`);
    }
    if (load.rate) lines.push(`${Math.round(load.rate)} ${unit}/s`);
  }
  if (load.kv_use !== undefined && unit !== "media tokens") lines.push(`KV ${Math.round(100 * load.kv_use)} %`);
  return [lines.join(" · "), Math.min(Math.max(share, load.kv_use ?? 0), 1)];
}

function replicaCard(load, unit) {
  const [text, share] = loadOf(load, unit);
  const bar = make("i");
  bar.style.width = `${100 * share}%`;
  const busy = make("div", { className: "load" }, bar);
  busy.setAttribute("aria-hidden", "true"); // the text says it
  return make("li", { className: worked.has(load.replica) ? "worked" : "" },
    make("code", { textContent: load.replica }), busy, make("div", { textContent: text }));
}

function stageView({ stage, state, replicas, unit, loads }) {
  const cards = loads.map((load) => replicaCard(load, unit));
  for (const [name, count] of Object.entries(replicas)) {
    if (name !== "RUNNING") cards.push(make("li", { className: "moving", textContent: `${count} ${name.toLowerCase()}` }));
  }
  const queued = loads.reduce((sum, load) => sum + load.calls, 0);
  const shown = `${plural(replicas.RUNNING ?? 0, "replicas")}, ${plural(queued, unit === "requests" ? unit : "calls")}`;
  return make("li", {},
    make("div", { className: "stage" },
      make("b", { textContent: stage }),
      make("span", { textContent: shown }),
      make("span", { className: state === "healthy" ? "healthy" : "unhealthy", textContent: state })),
    make("ul", { className: "replicas" }, ...cards));
}

function noteChanges(stages) {
  for (const { stage, state, replicas } of stages) {
    const counts = Object.entries(replicas).map(([name, count]) => `${count} ${name.toLowerCase()}`).join(", ") || "no replica";
    const now = `${counts}; ${state}`;
    if (before.has(stage) && before.get(stage) !== now) {
      $("changes").prepend(make("li", { textContent: `${new Date().toLocaleTimeString()} ${stage}: ${now}` }));
      while ($("changes").children.length > 12) $("changes").lastChild.remove();
    }
    before.set(stage, now);
  }
}

function showStages(stages) {
  noteChanges(stages);
  const [ingress] = stages;
  for (const load of ingress.loads) ingresses.set(load.replica, { load, at: Date.now() });
  for (const [replica, { at }] of ingresses) if (Date.now() - at > 20000) ingresses.delete(replica);
  ingress.loads = [...ingresses.values()].map(({ load }) => load).sort((a, b) => a.replica.localeCompare(b.replica));
  $("stages").replaceChildren(...stages.map(stageView));
}

async function look() {
  try {
    const response = await fetch("status", { cache: "no-store" });
    if (!response.ok) throw new Problem(await refusal(response));
    showStages(await response.json());
    $("watching").textContent = "";
  } catch (error) {
    const said = error instanceof Problem ? error.message : "The server does not answer; looking again.";
    if ($("watching").textContent !== said) $("watching").textContent = said;
  }
}

async function watch() {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, asking ? 1000 : 2000));
  }
}

setUpDrawing();
findModel();
watch();
