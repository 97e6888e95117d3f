"""The script of report.html: draws what `report` wrote as JSON, as text and never as markup."""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const {classes, exclusive, images} = data;
const $ = name => document.getElementById(name);
const GREEN = [46, 204, 64], BLUE = [30, 100, 255], RED = [255, 45, 45], VIOLET = [190, 60, 230];
const HEAT = [[13, 8, 35], [86, 20, 110], [186, 54, 85], [249, 140, 10], [252, 255, 164]];
const colour = rgb => `rgb(${rgb.join(",")})`;
const make = (tag, options = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), options);
  node.append(...children);
  return node;
};
const mark = rgb => make("i", {style: `background:${colour(rgb)}`});
const number = (value, digits = 1) => (value ?? null) === null ? "\u2013" : value.toFixed(digits);
const hasTruth = images.some(item => item.truth);
const tuned = Math.round(data.levels.reduce((a, b) => a + b, 0) / (data.levels.length || 1));
const {thresholds} = data;
const own = new Set(thresholds).size > 1 ? "each class its own" : number(thresholds[0], 3);
const state = {view: hasTruth ? "errors" : "prediction", level: null, item: null, solo: "",
  on: classes.map(() => true), order: images.slice(), down: false};

// --- What was understood, curves, scores -----------------------------------------------------

function table(content) {
  const cells = (tag, values) => make("tr", {}, ...values.map(v => make(tag, {textContent: v})));
  return make("div", {className: "scroll"}, make("table", {}, cells("th", content.columns),
    ...content.rows.map(row => cells("td", row))));
}

function card(title, ...children) {
  $("cards").append(make("section", {className: "card"}, make("h2", {textContent: title}),
    ...children));
}

function settings(title, rows) {
  const cells = rows.map(row => make("tr", {}, ...row.map((text, index) =>
    make("td", {textContent: text, className: index === 1 ? "" : "dim"}))));
  const content = make("div", {className: "scroll settings"}, make("table", {}, ...cells));
  const folded = make("details", {}, make("summary", {textContent: title}), content);
  return rows.length ? [folded] : [];
}

function ticks(low, high) {
  const raw = (high - low) / 4, ten = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 5, 10].map(n => n * ten).find(n => n >= raw), values = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) values.push(v);
  return values;
}

const LINES = ["#2e9e4f", "#8a94a3", "#d97b16", "#7a5af5"];

function chart(title, names, low, high) {
  const box = [34, 8, 412, 190], draw = (tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text ?? "";
    return node;
  };
  const runs = data.curves, all = runs.flat(), epochs = all.map(row => row.epoch);
  const first = Math.min(...epochs), last = Math.max(...epochs, first + 1);
  const x = v => box[0] + (v - first) / (last - first) * (box[2] - box[0]);
  const y = v => box[3] - (Math.min(v, high) - low) / (high - low || 1) * (box[3] - box[1]);
  const svg = draw("svg", {viewBox: "0 0 420 212", role: "img"});
  for (const value of ticks(low, high)) {
    svg.append(draw("line", {class: "axis", x1: box[0], x2: box[2], y1: y(value), y2: y(value)}));
    svg.append(draw("text", {x: box[0] - 6, y: y(value) + 4, "text-anchor": "end"},
      String(+value.toPrecision(3))));
  }
  for (const value of ticks(first, last).filter(Number.isInteger))
    svg.append(draw("text", {x: x(value), y: 206, "text-anchor": "middle"}, String(value)));
  names.forEach(([name], index) => runs.forEach(rows => {
    const points = rows.filter(row => row[name] !== null && row[name] >= low - 1e9);
    const line = points.map(row => `${x(row.epoch)},${y(Math.max(low, row[name]))}`).join(" ");
    svg.append(draw("polyline", {points: line, fill: "none", stroke: LINES[index],
      "stroke-width": runs.length > 1 ? 1.1 : 2, "stroke-linejoin": "round"}));
    if (points.length === 1) svg.append(draw("circle", {cx: x(points[0].epoch),
      cy: y(points[0][name]), r: 3, fill: LINES[index]}));
  }));
  const legend = names.map(([, text], index) => make("span", {},
    make("i", {style: `background:${LINES[index]}`}), text));
  card(title, svg, make("div", {className: "legend dim"}, ...legend));
}

function curves() {
  const rows = data.curves.flat();
  const named = list => list.filter(([name]) => rows.some(row => (row[name] ?? null) !== null));
  const losses = named([["train_loss", "training"], ["val_loss", "validation"]]);
  const values = rows.flatMap(row => losses.map(([name]) => row[name])).filter(v => v !== null);
  if (losses.length) chart("Loss over the epochs", losses, Math.min(0, ...values),
    Math.max(...values));
  const scores = named([["MaxF", "MaxF"], ["IoU50", "IoU at 0.5"], ["mIoU", "mIoU"],
    ["mDice", "mean Dice"]]).slice(0, 4);
  const best = Math.max(...rows.flatMap(row => scores.map(([name]) => row[name] ?? 0)));
  if (scores.length) chart("Validation scores over the epochs, %", scores,
    Math.max(0, best - 40), 100);
}

function head() {
  document.title = data.title;
  document.querySelector("h1").textContent = data.title;
  $("when").textContent = data.subtitle;
  for (const [name, value, error, note] of data.numbers) {
    const shown = make("b", {textContent: value});
    if (error) shown.append(make("small", {textContent: ` \u00b1 ${error}`}));
    $("numbers").append(make("div", {className: "number"}, name, shown,
      make("small", {textContent: note})));
  }
  const facts = data.facts.map(text => make("p", {textContent: text}));
  card("What was understood", ...facts, ...settings("chosen by itself, and why", data.reasons),
    ...settings("all settings", data.settings));
  curves();
  for (const [title, content, note] of data.tables)
    card(title, table(content), make("p", {className: "dim", textContent: note}));
}

// --- Layers: probability, ground truth and prediction of the reduced pixels ------------------

const recent = [];  // items whose layers are decoded

async function decode(uri) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  const canvas = make("canvas", {width: image.width, height: image.height});
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(image, 0, 0);
  const {data} = context.getImageData(0, 0, image.width, image.height);
  return {data, width: image.width, height: image.height / 3};
}

function layersOf(item) {
  if (!item.decoded) {
    item.decoded = Promise.all(item.layers.map(([, png]) =>
      decode(`data:image/png;base64,${png}`)));
    recent.push(item);
    if (recent.length > 150) delete recent.shift().decoded;
  }
  return item.decoded;
}

// What the classes that are switched on say of each pixel, in arrays. A layer has the probability,
// below it the ground truth, below it the mask as written: of exclusive classes their numbers,
// else 0 and 1; 255 is ignored. `truth` and `found` hold the number of a class + 1.
const HIT = 1, MISS = 2, FALSE = 4, IGNORED = 8;

function merge(item, planes) {
  const size = planes[0].width * planes[0].height, level = state.level;
  const array = () => new Uint8Array(size);
  const truth = array(), found = array(), probability = array(), errors = array(), seen = array();
  planes.forEach(({data}, index) => {
    const k = item.layers[index][0];
    if (!exclusive && !state.on[k]) return;
    for (let i = 0, at = 0; i < size; i++, at += 4) {
      const target = data[at + 4 * size], mask = data[at + 8 * size];
      if (data[at] > probability[i]) probability[i] = data[at];
      if (exclusive) {
        const is = state.on[mask], was = state.on[target];
        if (is) found[i] = mask + 1;
        if (was) truth[i] = target + 1;
        if (target === 255) continue;
        errors[i] = is && was && found[i] === truth[i] ? HIT : (was ? MISS : 0) | (is ? FALSE : 0);
      } else {
        const is = level === null ? mask === 1 : data[at] >= level;
        if (is) found[i] = k + 1;
        if (target === 1) truth[i] = k + 1;
        if (target !== 255) errors[i] |= target === 1 ? is ? HIT : MISS : is ? FALSE : 0;
      }
      if (target !== 255) seen[i] = 1;
    }
  });
  for (let i = 0; item.truth && state.on.some(Boolean) && i < size; i++) {
    if (seen[i]) continue;
    errors[i] = IGNORED;
    truth[i] = 255;
  }
  return {truth, found, probability, errors};
}

function count({found, errors}) {
  const numbers = {all: found.length, found: 0, hits: 0, misses: 0, false: 0};
  for (let i = 0; i < found.length; i++) {
    if (found[i] && !classes[found[i] - 1].background) numbers.found++;
    if (errors[i] & HIT) numbers.hits++;
    if (errors[i] & MISS) numbers.misses++;
    if (errors[i] & FALSE) numbers.false++;
  }
  return numbers;
}

// --- Colours of the values in those arrays, packed as a canvas has them ----------------------

const pack = ([r, g, b], alpha) => (alpha << 24 | b << 16 | g << 8 | r) >>> 0;
const DARK = pack([0, 0, 0], 178);
const COLOURS = {truth: new Uint32Array(256), errors: new Uint32Array(16),
  probability: new Uint32Array(256)};
classes.forEach(({colour, background}, k) => {
  if (!background) COLOURS.truth[k + 1] = pack(colour, 140);
});
COLOURS.prediction = COLOURS.truth.slice();
COLOURS.truth[255] = COLOURS.errors[IGNORED] = DARK;
for (let bits = 1; bits < IGNORED; bits++) {
  const wrong = {[MISS]: BLUE, [FALSE]: RED, [MISS | FALSE]: VIOLET}[bits & ~HIT];
  if (wrong || !exclusive) COLOURS.errors[bits] = pack(wrong || GREEN, 160);
}
COLOURS.probability.forEach((_, value, table) => {
  const place = value / 255 * (HEAT.length - 1), low = Math.min(HEAT.length - 2, Math.floor(place));
  const mixed = HEAT[low].map((from, n) => from + (HEAT[low + 1][n] - from) * (place - low));
  table[value] = pack(mixed, 255);
});

function paint(canvas, view, {width, height}, merged) {
  const values = merged[view === "prediction" ? "found" : view], table = COLOURS[view];
  const drawn = new ImageData(width, height), out = new Uint32Array(drawn.data.buffer);
  for (let i = 0; i < out.length; i++) out[i] = table[values[i]];
  Object.assign(canvas, {width, height});
  canvas.getContext("2d").putImageData(drawn, 0, 0);
}

// Draw an item's views on their canvases, unless they were asked for something else meanwhile.
async function draw(item, pairs) {
  const turn = draw.turn = (draw.turn || 0) + 1;
  for (const [canvas] of pairs) canvas.turn = turn;
  const planes = await layersOf(item);
  const wanted = pairs.filter(([canvas, view]) => canvas.turn === turn && view !== "image");
  if (!planes.length) return null;
  const merged = merge(item, planes);
  for (const [canvas, view] of wanted) paint(canvas, view, planes[0], merged);
  return count(merged);
}

function picture(item, view) {
  const canvas = make("canvas"), ratio = `aspect-ratio:${item.width / item.height}`;
  const image = make("img", {alt: "", decoding: "async", draggable: false,
    src: `data:image/jpeg;base64,${item.image}`});
  const grey = view === "errors" || classes.length > 1 && view !== "image";
  const fit = make("div", {className: "fit", style: ratio}, image, canvas);
  return {node: make("div", {className: grey ? "pic grey" : "pic"}, fit), canvas, fit};
}

// --- Thumbnails: made when they come into sight ----------------------------------------------

const ratios = images.map(item => item.width / item.height).sort((a, b) => a - b);
const typical = Math.min(2.4, Math.max(0.9, ratios[ratios.length >> 1]));  // a thumbnail's ratio
document.body.style.setProperty("--ratio", typical);
const seen = new Map();  // {item: canvas} of the thumbnails in sight
const watcher = new IntersectionObserver(entries => entries.forEach(entry => {
  const item = entry.target.item;
  if (entry.isIntersecting) show(item);
  else hide(item);
}), {rootMargin: "200px"});

function show(item) {
  const {node, canvas, fit} = picture(item, state.view);
  fit.style[item.width / item.height > typical ? "width" : "height"] = "100%";
  item.thumb.querySelector(".pic").replaceWith(node);
  seen.set(item, canvas);
  draw(item, [[canvas, state.view]]);
}

function hide(item) {
  if (!seen.delete(item)) return;
  item.thumb.querySelector(".pic").replaceChildren();
}

function mean(values) {
  const chosen = (values || []).filter((value, k) => state.on[k] && value !== null);
  return chosen.length ? chosen.reduce((a, b) => a + b, 0) / chosen.length : null;
}

function share(values) {
  const chosen = (values || []).filter((_, k) => state.on[k] && !classes[k].background);
  return values ? Math.min(100, chosen.reduce((a, b) => a + b, 0)) : null;
}

const KEYS = {
  score: [hasTruth ? "score (Dice)" : "", item => mean(item.scores) ?? 1e9],
  share: [hasTruth ? "foreground, ground truth" : "", item => share(item.truth) ?? -1],
  found: ["foreground, prediction", item => share(item.found)],
  size: ["size of the image", item => item.width * item.height],
  name: ["name", () => 0],
};

function label(item) {
  const score = mean(item.scores), [name, about] = item.thumb.querySelector(".label").children;
  name.textContent = item.id;
  const foreground = `foreground ${number(share(item.truth || item.found))} %`;
  about.textContent = item.scores ? `Dice ${number(score)} \u00b7 ${foreground}` : foreground;
}

function arrange() {
  const value = KEYS[$("sort").value][1], part = $("filter").value.toLowerCase();
  const names = new Intl.Collator(undefined, {numeric: true});
  const sign = state.down ? -1 : 1;
  state.order = images.filter(item => item.id.toLowerCase().includes(part));
  state.order.sort((a, b) => sign * (value(a) - value(b) || names.compare(a.id, b.id)));
  $("grid").replaceChildren(...state.order.map(item => item.thumb));
  $("order").textContent = state.down ? "\u2193 high to low" : "\u2191 low to high";
  const some = state.order.length < images.length ? `${state.order.length} of ` : "";
  $("count").textContent = `${some}${images.length} images${data.chosen}`;
}

function refresh() {
  images.forEach(label);
  for (const [item] of [...seen]) show(item);
  if (open()) view();
}

let waiting = 0;
function redraw() {  // once for each frame
  $("value").textContent = state.level === null ? own : (state.level / 255).toFixed(3);
  $("tuned").disabled = state.level === null;
  $("note").textContent = state.level === null ? data.notes[0] : data.notes[1];
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => {
    for (const [item, canvas] of seen) draw(item, [[canvas, state.view]]);
    if (open()) view();
  });
}

// --- Viewer: an image side by side -----------------------------------------------------------

const dialog = document.querySelector("dialog"), open = () => dialog.open;
const TITLES = {image: "image", truth: "ground truth", prediction: "prediction",
  errors: "errors", probability: "probability"};

function viewsOf(item) {
  const without = item.truth ? [] : ["truth", "errors"];
  if (!item.probability) without.push("probability");
  return Object.keys(TITLES).filter(name => !without.includes(name));
}

function caption(name) {
  const node = make("div", {className: "caption"}, make("b", {textContent: TITLES[name]}));
  const entry = (rgb, text) => node.append(make("span", {className: "dim"}, mark(rgb), text));
  if (name === "errors") {
    if (!exclusive) entry(GREEN, "hit");
    entry(BLUE, "miss");
    entry(RED, "false alarm");
    if (classes.length > 1) entry(VIOLET, "another class");
  } else if (name === "probability") {
    const stops = HEAT.map(colour).join(",");
    node.append(make("span", {className: "dim", textContent: "0"}), make("span",
      {className: "ramp", style: `background:linear-gradient(90deg,${stops})`}),
      make("span", {className: "dim", textContent: "1"}));
  }
  return node;
}

function arrangement(count, ratio, top) {  // how many columns of which width are largest
  let best = [1, 0];
  for (let columns = 1; columns <= count; columns++) {
    const wide = (dialog.clientWidth - 32 - 10 * (columns - 1)) / columns;
    const high = (window.innerHeight - top - 24) / Math.ceil(count / columns) - 34;
    const width = Math.floor(Math.min(wide, Math.max(high, 150) * ratio));
    if (width > best[1]) best = [columns, width];
  }
  return best;
}

async function view() {
  const {item} = state, names = viewsOf(item);
  const shown = names.includes(state.solo) ? [state.solo] : names;
  const panels = document.querySelector(".panels");
  document.querySelector("dialog h2").textContent = item.id;
  const ratio = item.width / item.height;
  const [columns, width] = arrangement(shown.length, ratio, panels.offsetTop);
  if (panels.item !== item || panels.columns !== `${columns} ${width} ${shown}`) {
    panels.replaceChildren(...shown.map(name => {
      const {node, canvas} = picture(item, name);
      const title = state.solo ? "all" : "this alone";
      const panel = make("div", {className: "panel", title, canvas, onclick: () => {
        state.solo = state.solo ? "" : name;
        view();
      }}, caption(name), node);
      panel.dataset.view = name;
      return panel;
    }));
    panels.item = item;
    panels.columns = `${columns} ${width} ${shown}`;
    panels.style.gridTemplateColumns = `repeat(${columns}, ${width}px)`;
  }
  const pairs = [...panels.children].map(panel => [panel.canvas, panel.dataset.view]);
  const numbers = await draw(item, pairs);
  if (state.item === item && numbers) describe(item, numbers);
}

function describe(item, numbers) {
  const {all, hits, misses, false: wrong, found} = numbers, score = mean(item.scores);
  const sum = 2 * hits + wrong + misses;
  const size = `${item.width}\u00d7${item.height}`;
  const texts = [`${state.order.indexOf(item) + 1} of ${state.order.length}`, size];
  if (score !== null) texts.push(`Dice ${number(score)} %`);
  texts.push(`foreground ${number(100 * found / all)} %`);
  if (item.truth) texts.push(`${number(share(item.truth))} % in the ground truth`);
  if (item.truth && state.level !== null && sum)
    texts.push(`at this threshold: Dice about ${number(200 * hits / sum)} %`);
  $("about").textContent = texts.join(" \u00b7 ");
  $("about").dataset.found = found;
}

function turn(step) {
  const count = state.order.length, place = state.order.indexOf(state.item) + step;
  state.item = state.order[(place + count) % count];
  view();
}

function look(item) {
  state.item = item;
  $("away").append($("controls"));
  if (!open()) dialog.showModal();
  view();
}

dialog.addEventListener("close", () => {
  $("home").append($("controls"));
  document.querySelector(".panels").replaceChildren();
  document.querySelector(".panels").item = null;
  const {item} = state;
  item.thumb.focus({preventScroll: true});
  item.thumb.scrollIntoView({block: "nearest"});
});
document.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step || !open()) return;
  event.preventDefault();  // also where the slider has the focus, which goes up and down
  turn(step);
});

// --- Controls --------------------------------------------------------------------------------

function press(container, entries, pressed, click) {
  const buttons = entries.map(([key, content]) => {
    const button = make("button", {onclick: () => {
      click(key);
      update();
    }}, ...[content].flat());
    button.dataset.key = key;
    return button;
  });
  const update = () => buttons.forEach(button =>
    button.setAttribute("aria-pressed", pressed(button.dataset.key)));
  container.append(...buttons);
  update();
  return update;
}

function controls() {
  for (const [key, [text]] of Object.entries(KEYS))
    if (text) $("sort").append(make("option", {value: key, textContent: text}));
  const names = [...new Set(images.flatMap(viewsOf))].map(name => [name, TITLES[name]]);
  press($("views"), names, name => name === state.view, name => {
    state.view = name;
    refresh();
  });
  if (classes.length > 1) {
    const entries = classes.map(({name, colour}, k) => [k, [mark(colour), name]]);
    const update = press($("classes"), entries, k => state.on[k], k => {
      state.on[k] = !state.on[k];
      refresh();
      arrange();
    });
    for (const [text, value] of [["all", true], ["none", false]])
      $("classes").append(make("button", {textContent: text, onclick: () => {
        state.on.fill(value);
        update();
        refresh();
        arrange();
      }}));
  }
  $("threshold").hidden = exclusive || !images.some(item => item.probability);
  $("level").value = tuned;
  $("sort").onchange = $("filter").oninput = arrange;
  $("order").onclick = () => {
    state.down = !state.down;
    arrange();
  };
  $("level").oninput = event => {
    state.level = +event.target.value;
    redraw();
  };
  $("tuned").onclick = () => {
    state.level = null;
    $("level").value = tuned;
    redraw();
  };
  $("previous").onclick = () => turn(-1);
  $("next").onclick = () => turn(1);
  $("close").onclick = () => dialog.close();
  window.addEventListener("resize", () => open() && view());
}

function start() {
  head();
  controls();
  for (const item of images) {
    const text = make("div", {className: "label"}, make("div"), make("div", {className: "dim"}));
    item.thumb = make("button", {className: "thumb", title: item.id, item,
      onclick: () => look(item)}, make("div", {className: "pic"}), text);
    watcher.observe(item.thumb);
  }
  images.forEach(label);
  arrange();
  redraw();
}
start();
"""
