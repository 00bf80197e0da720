// The page of `export.serve`: one picture, every variant's answer, the patches that the chosen variant kept.
"use strict";

const $ = (id) => document.getElementById(id);
const percent = (share) => (share < 0.0005 ? "< 0.1 %" : (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %");
const state = { info: null, bitmap: null, blob: null, answers: new Map(), model: "", names: [], round: 0, number: -1 };

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function element(tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = name;
  return made;
}

async function ask(model) {
  const query = new URLSearchParams({ model });
  state.names.forEach((name) => query.append("class", name));
  if (state.names.length) query.set("template", $("template").value);
  const response = await fetch("/classify?" + query, { method: "POST", body: state.blob });
  const answer = await response.json().catch(() => ({ error: "status " + response.status }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// The chosen variant first, then the others; a newer picture ends the round of an older one.
async function askAll() {
  if (!state.blob) return;
  const round = ++state.round;
  state.answers.clear();
  say("looking …");
  const models = state.info.variants.map((variant) => variant.model);
  models.sort((a, b) => (b === state.model) - (a === state.model));
  try {
    for (const model of models) {
      const answer = await ask(model);
      if (round !== state.round) return;
      state.answers.set(model, answer);
      show();
    }
    say("");
  } catch (error) {
    if (round === state.round) say(error.message, true);
    show();
  }
}

async function take(blob, number = -1) {
  try {
    state.bitmap = await createImageBitmap(blob);
  } catch {
    say("this file is not a picture that a browser can show", true);
    return;
  }
  state.blob = blob;
  state.number = number;
  await askAll();
}

async function example() {
  const number = state.number < 0 ? 3 : (state.number + 7) % 2000;
  const response = await fetch("/example?number=" + number);
  if (response.ok) await take(await response.blob(), number);
}

// "patchrank-keep-0.6" -> "keep 60 %"; other variants keep their name.
function label(model) {
  const name = model.replace(/^patchrank-/, ""), keep = name.match(/^keep-([\d.]+)$/);
  if (!keep) return name;
  return Number(keep[1]) === 1 ? "all patches" : "keep " + percent(Number(keep[1]));
}

function drawVariants() {
  const buttons = state.info.variants.map((variant) => {
    const answer = state.answers.get(variant.model);
    const button = element("button", "", "variant");
    button.type = "button";
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", String(variant.model === state.model));
    button.append(element("b", label(variant.model)));
    button.append(element("small", percent(variant.macs_share) + " compute"));
    button.append(element("small", answer ? `${answer.top[0].name}, ${percent(answer.top[0].probability)}` : "–"));
    button.onclick = () => { state.model = variant.model; show(); };
    return button;
  });
  $("variants").replaceChildren(...buttons);
}

function drawTop(answer) {
  const rows = (answer ? answer.top : []).map(({ name, probability }) => {
    const row = element("li"), bar = element("div", "", "bar"), fill = element("i");
    fill.style.width = 100 * probability + "%";
    bar.append(fill);
    row.append(element("span", name, "name"), element("span", percent(probability), "share"), bar);
    return row;
  });
  $("top").replaceChildren(...(rows.length ? rows : [element("li", "no picture yet", "none")]));
}

// The crop that the model sees, in the sent picture's own resolution; patches outside `kept` dark and grey.
function drawPicture(answer) {
  const canvas = $("canvas"), context = canvas.getContext("2d");
  const [rows, columns] = answer.grid, [left, top, width, height] = answer.crop;
  canvas.width = 1008;
  canvas.height = Math.round((1008 * height) / width);
  const place = [left, top, width, height, 0, 0, canvas.width, canvas.height];
  context.imageSmoothingQuality = "high";
  context.drawImage(state.bitmap, ...place);
  if (answer.kept && $("dim").checked) {
    const kept = new Set(answer.kept), across = canvas.width / columns, down = canvas.height / rows;
    const gone = new Path2D();
    for (let number = 0; number < rows * columns; number++) {
      if (!kept.has(number)) gone.rect((number % columns) * across, Math.floor(number / columns) * down, across, down);
    }
    context.save();
    context.clip(gone);
    context.filter = "grayscale(1)";
    context.drawImage(state.bitmap, ...place);
    context.filter = "none";
    context.fillStyle = "rgba(10, 18, 17, .8)";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.restore();
  }
  canvas.hidden = false;
  $("invitation").hidden = true;
  $("another").hidden = !state.info.example;
  $("switch").hidden = false;
  $("drop").classList.add("full");
}

function show() {
  const answer = state.answers.get(state.model);
  drawVariants();
  if (!answer && state.answers.size) return;
  drawTop(answer);
  if (!answer) return;
  drawPicture(answer);
  const all = answer.grid[0] * answer.grid[1], kept = answer.kept ? answer.kept.length : all;
  $("patches").textContent = `${kept} of ${all} patches · ${answer.ms.toFixed(1)} ms`;
  $("canvas").dataset.kept = kept;
}

function wire() {
  const drop = $("drop");
  $("file").onchange = () => $("file").files[0] && take($("file").files[0]);
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
    });
  }
  document.addEventListener("drop", (event) => event.dataTransfer.files[0] && take(event.dataTransfer.files[0]));
  document.addEventListener("paste", (event) => event.clipboardData.files[0] && take(event.clipboardData.files[0]));
  for (const id of ["example", "another"]) {
    $(id).onclick = (event) => { event.preventDefault(); example(); };
  }
  $("dim").onchange = show;
  $("classes").onsubmit = (event) => {
    event.preventDefault();
    state.names = $("names").value.split(/[,\n]/).map((name) => name.trim()).filter(Boolean);
    askAll();
  };
  $("reset").onclick = () => {
    state.names = [];
    $("names").value = "";
    $("template").value = state.info.template;
    askAll();
  };
}

async function start() {
  state.info = await (await fetch("/info")).json();
  state.model = state.info.default;
  $("model").textContent = state.info.backbone === "embedded" ? "the embedded model: it knows handwritten digits, nothing else" : state.info.backbone;
  $("example").hidden = !state.info.example;
  $("classes").hidden = !state.info.own_classes;
  $("template").value = state.info.template;
  wire();
  show();
  document.body.dataset.ready = "yes";
}

start().catch((error) => say(error.message, true));
