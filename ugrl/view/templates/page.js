"use strict";
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const { classes, colours, runs, photographs } = data;
const STEP = 24;
const two = runs.length > 1;
const hasTruth = photographs.some((p) => p.truth);
const LAYERS = [["cam", "CAM"], ["pseudo", "pseudo-label"], ["predicted", "prediction"], ["u", "uncertainty"]];
if (hasTruth) LAYERS.push(["truth", "true mask"]);

function made(tag, { text, ...more } = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(more)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  element.append(...inside);
  return element;
}
const percent = (x) => (x === null || x === undefined ? "–" : (100 * x).toFixed(0) + " %");
const fixed = (x) => (x === null || x === undefined ? "–" : x.toFixed(2));
const swatch = (c) => {
  const box = made("span", { class: "swatch" });
  box.style.background = colours[c];
  return box;
};
const option = (value, text) => made("option", { value, text });

// -- what is chosen: in the form, and in the page's address, so that it can be kept and sent --

const form = $("form");
$("class").append(option("", "all"), ...classes.map((name, c) => option(c, name)).slice(1));
if (two) {
  $("run").append(option("", "both"), ...runs.map((run, k) => option(k, run.name)));
  $("sort").append(option("gain", "difference of the runs"));
} else {
  $("run").append(option("", "one"));
  $("run-label").hidden = true;
}
for (const [name, text] of LAYERS) {
  const box = made("input", { type: "checkbox", name: "layer", value: name });
  box.checked = true;
  $("layers").append(made("label", { class: "check" }, box, text));
}
if (!hasTruth) for (const name of ["truth", "missed", "false"]) $("where").querySelector(`[value=${name}]`).remove();

function restore() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const name of ["find", "class", "where", "sort", "run", "opacity"])
    if (kept.has(name)) form.elements[name].value = kept.get(name);
  $("reverse").checked = kept.has("reverse");
  const hidden = (kept.get("hide") || "").split(",");
  for (const box of form.querySelectorAll("[name=layer]")) box.checked = !hidden.includes(box.value);
}
function keep() {
  const kept = new URLSearchParams();
  for (const name of ["find", "class", "where", "sort", "run", "opacity"]) {
    const field = form.elements[name];
    const usual = field.type === "range" ? field.defaultValue : field.options ? field.options[0].value : "";
    if (field.value !== usual) kept.set(name, field.value);
  }
  if ($("reverse").checked) kept.set("reverse", "1");
  const hidden = [...form.querySelectorAll("[name=layer]")].filter((box) => !box.checked).map((box) => box.value);
  if (hidden.length) kept.set("hide", hidden.join(","));
  history.replaceState(null, "", "#" + kept);
}

// -- which photographs, in which order --

const chosenClass = () => ($("class").value === "" ? null : Number($("class").value));
const judge = () => Number($("run").value || 0);
function fits(photo) {
  const c = chosenClass(), run = photo.runs[judge()];
  const words = $("find").value.trim().toLowerCase();
  if (words) {
    const shown = new Set([...photo.tags, ...(photo.truth || []), ...photo.runs.flatMap((r) => r.predicted)]);
    const text = [photo.id, ...[...shown].map((s) => classes[s])].join("\n").toLowerCase();
    if (!words.split(/\s+/).every((word) => text.includes(word))) return false;
  }
  if (c === null) return true;
  const is = { tags: photo.tags.includes(c), truth: (photo.truth || []).includes(c), predicted: run.predicted.includes(c) };
  switch ($("where").value) {
    case "missed": return is.truth && !is.predicted;
    case "false": return is.predicted && !!photo.truth && !is.truth;
    case "": return is.tags || is.truth || is.predicted;
    default: return is[$("where").value];
  }
}
function rank(photo) {
  const c = chosenClass(), run = photo.runs[judge()];
  switch ($("sort").value) {
    case "u": return c === null ? negative(run.most_u) : negative(run.u[c]);
    case "class": return photo.tags.length ? photo.tags[0] : null;
    case "name": return 0;
    case "gain": {
      const [a, b] = photo.runs.map((r) => (c === null ? r.miou : r.iou[c]));
      return known(a) && known(b) ? a - b : null;
    }
    default: return c !== null && known(run.iou[c]) ? run.iou[c] - 1 : negative(run.error);
  }
}
const known = (x) => x !== null && x !== undefined;
const negative = (x) => (known(x) ? -x : null);
const byName = new Intl.Collator(undefined, { numeric: true });
let order = [], drawn = 0;
function sort() {
  const rows = photographs.map((photo, k) => ({ k, photo })).filter(({ photo }) => fits(photo));
  for (const row of rows) row.rank = rank(row.photo);
  const sign = $("reverse").checked ? -1 : 1;
  rows.sort((a, b) => {
    if (known(a.rank) !== known(b.rank)) return known(a.rank) ? -1 : 1; // what is not known comes last either way
    return sign * ((a.rank || 0) - (b.rank || 0) || byName.compare(a.photo.id, b.photo.id));
  });
  order = rows.map((row) => row.k);
}

// -- pictures --

function sources(k) {
  const lines = $("p" + k).textContent.split("\n");
  return Object.fromEntries(data.pictures.map((name, i) => [name, lines[i]]));
}
function tile(photo, from, layer, words, named) {
  const image = (src, kind) => made("img", { src, class: kind, alt: "", loading: "lazy", decoding: "async" });
  const stack = made("div", { class: Math.max(photo.w, photo.h) < 100 ? "stack coarse" : "stack" });
  stack.style.aspectRatio = `${photo.w} / ${photo.h}`;
  stack.append(image(from.photo, "under"));
  if (layer) stack.append(image(from[layer], "over"));
  const caption = made("figcaption", {}, made("b", { text: words }));
  if (named) caption.append(" ", named);
  stack.setAttribute("role", "img");
  stack.setAttribute("aria-label", `${words} of ${photo.id}${named ? ": " + named : ""}`);
  return made("figure", {}, stack, caption);
}
const listed = (shown) => (shown.length ? shown.map((c) => classes[c]).join(", ") : "background only");
function camWords(photo, run) {
  return photo.tags.map((c) => `${classes[c]} ${fixed(run.p[c])}`).join(", ");
}
function layerTile(photo, from, name, k, suffix) {
  const run = photo.runs[k];
  const words = LAYERS.find(([layer]) => layer === name)[1] + suffix;
  const named = {
    cam: () => camWords(photo, run),
    pseudo: () => listed(run.pseudo),
    predicted: () => listed(run.predicted),
    u: () => photo.tags.map((c) => `${classes[c]} ${fixed(run.u[c])}`).join(", "),
  }[name]();
  return tile(photo, from, name + k, words, named);
}
function tiles(k) {
  const photo = photographs[k], from = sources(k);
  const layers = [...form.querySelectorAll("[name=layer]:checked")].map((box) => box.value);
  const plain = tile(photo, from, null, "photograph", "");
  const truth = photo.truth && layers.includes("truth") ? tile(photo, from, "truth", "true mask", listed(photo.truth)) : null;
  const own = layers.filter((name) => name !== "truth");
  if (!two || $("run").value !== "") {
    const run = judge();
    const all = [plain, ...own.map((name) => layerTile(photo, from, name, run, ""))];
    if (truth) all.push(truth);
    return made("div", { class: "tiles" }, ...all);
  }
  const pair = (...inside) => made("div", { class: "pair" }, ...inside);
  const first = truth ? pair(plain, truth) : pair(plain);
  return made("div", { class: "pairs" }, first,
    ...own.map((name) => pair(layerTile(photo, from, name, 0, " · A"), layerTile(photo, from, name, 1, " · B"))));
}
function numbers(photo) {
  const parts = made("span", { class: "numbers" });
  const marks = (run) => (known(run.miou) ? ["IoU", percent(run.miou)] : ["error", percent(run.error)]);
  const shown = two && $("run").value === "" ? runs.map((_, k) => k) : [judge()];
  for (const k of shown) {
    const run = photo.runs[k], [word, value] = marks(run);
    if (shown.length > 1) parts.append(k ? " · B " : "A ");
    parts.append(`${word} `, made("b", { text: value }), " · u ", made("b", { text: fixed(run.most_u) }));
    if (run.guessed.length) parts.append(` · also guessed: ${listed(run.guessed)}`);
  }
  if (two) {
    const [a, b] = photo.runs;
    if (known(a.miou) && known(b.miou)) {
      const gain = 100 * (b.miou - a.miou);
      parts.append(" · B − A ", made("span", { class: gain < 0 ? "down" : "up", text: (gain < 0 ? "−" : "+") + Math.abs(gain).toFixed(0) }));
    }
  }
  return parts;
}
const tags = (photo) => made("span", {}, ...(photo.tags.length
  ? photo.tags.map((c) => made("span", { class: "tag" }, swatch(c), classes[c]))
  : [made("span", { class: "tag", text: "no tag" })]));
function card(k) {
  const photo = photographs[k];
  const open = made("div", { class: "open" }, tiles(k));
  open.addEventListener("click", () => enlarge(k));
  const box = made("article", { class: "card", tabindex: "0", "data-k": k, "aria-label": photo.id },
    made("header", {}, made("h2", { text: photo.id }), tags(photo), numbers(photo)), open);
  return box;
}

// -- the list: cards are made when one comes near --

function draw(some) {
  const cards = order.slice(drawn, drawn + some).map(card);
  drawn += cards.length;
  $("cards").append(...cards);
  $("more").textContent = drawn < order.length ? `${order.length - drawn} more below` : "";
}
function show() {
  sort();
  drawn = 0;
  $("cards").replaceChildren();
  draw(STEP);
  const c = chosenClass();
  $("count").textContent = `${order.length} of ${photographs.length} photographs` + (order.length ? "" : ": nothing fits; loosen the filters");
  for (const button of $("legend").querySelectorAll("button")) button.setAttribute("aria-pressed", String(Number(button.value) === c));
  $("where-label").hidden = c === null;
  look();
  keep();
}
function look() {
  document.documentElement.style.setProperty("--opacity", $("opacity").value / 100);
}
new IntersectionObserver((seen) => {
  if (seen.some((entry) => entry.isIntersecting) && drawn < order.length) draw(STEP);
}, { rootMargin: "1500px" }).observe($("more"));
addEventListener("scroll", () => { // after a jump over all that was drawn
  if (drawn < order.length && $("more").getBoundingClientRect().top < innerHeight + 1500) draw(STEP);
}, { passive: true });

// -- one photograph, large, with its numbers --

const large = $("large");
let at = -1;
function enlarge(k) {
  at = order.indexOf(k);
  const photo = photographs[k];
  const button = (text, action) => {
    const b = made("button", { type: "button", text });
    b.addEventListener("click", action);
    return b;
  };
  const nav = made("nav", {}, made("h2", { text: photo.id }), made("span", { class: "numbers", text: `${at + 1} of ${order.length}` }),
    button("← previous", () => move(-1)), button("next →", () => move(1)), button("close", () => large.close()));
  large.replaceChildren(nav, made("p", {}, tags(photo), numbers(photo)), tiles(k), table(photo));
  if (!large.open) large.showModal();
  large.scrollTop = 0;
}
function move(by) {
  const next = at + by;
  if (next < 0 || next >= order.length) return;
  enlarge(order[next]);
}
function table(photo) {
  const shown = new Set([0, ...photo.tags, ...(photo.truth || []), ...photo.runs.flatMap((r) => [...r.predicted, ...Object.keys(r.iou).map(Number)])]);
  const head = made("tr", {}, made("th", { text: "class" }), made("th", { text: "tag" }));
  for (const [k] of runs.entries())
    for (const word of ["probability", "u", "IoU of CAM", "IoU"]) head.append(made("th", { text: two ? `${word} ${"AB"[k]}` : word }));
  const body = [...shown].sort((a, b) => a - b).map((c) => {
    const row = made("tr", {}, made("td", { text: classes[c] }), made("td", { text: photo.tags.includes(c) ? "yes" : "" }));
    for (const run of photo.runs)
      row.append(...[fixed(run.p[c]), fixed(run.u[c]), percent(run.cam_iou[c]), percent(run.iou[c])].map((text) => made("td", { text })));
    return row;
  });
  return made("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "numbers by class" },
    made("table", {}, made("thead", {}, head), made("tbody", {}, ...body)));
}
large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
large.addEventListener("close", () => {
  while (at >= drawn && drawn < order.length) draw(STEP);
  const back = $("cards").children[at];
  if (back) { back.focus(); back.scrollIntoView({ block: "nearest" }); }
});

// -- keys --

function go(by) {
  const cards = $("cards").children, here = document.activeElement.closest ? document.activeElement.closest(".card") : null;
  let next = here ? [...cards].indexOf(here) + by : 0;
  if (next >= drawn) draw(STEP);
  next = Math.max(0, Math.min(next, cards.length - 1));
  if (cards[next]) {
    cards[next].focus({ preventScroll: true });
    cards[next].scrollIntoView({ block: "center" });
  }
}
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input[type=search], select, input[type=range]");
  if (large.open) {
    if (event.key === "ArrowRight" || event.key === "j") move(1);
    else if (event.key === "ArrowLeft" || event.key === "k") move(-1);
    else if (event.key === "o") document.body.classList.toggle("bare");
    else return;
  } else if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  } else if (event.key === "j") go(1);
  else if (event.key === "k") go(-1);
  else if (event.key === "o") document.body.classList.toggle("bare");
  else if (event.key === "/") { $("filters").open = true; $("find").focus(); }
  else if (event.key === "Enter" && event.target.matches(".card")) enlarge(Number(event.target.dataset.k));
  else return;
  event.preventDefault();
});

// -- begin --

$("about").textContent = `Split '${data.split}', ${photographs.length} photographs. ` + runs.map((run, k) =>
  `${two ? "AB"[k] + " is " : ""}${run.name}, step ${run.step}` +
  (known(run.miou) ? `: mean IoU ${(100 * run.miou).toFixed(1)} % over these photographs` : "")).join("; ") + ".";
for (const [c, name] of [...classes.entries()].slice(1)) {
  const button = made("button", { type: "button", value: c }, swatch(c), name);
  button.addEventListener("click", () => { $("class").value = chosenClass() === c ? "" : c; show(); });
  $("legend").append(button);
}
const grey = made("span", { class: "swatch" });
grey.style.background = data.ignored;
$("legend").append(made("span", {}, grey, "undecided or ignored"));
const scale = made("span", { class: "scale" });
scale.style.background = `linear-gradient(to right, ${data.heat.join(",")})`;
const ranges = runs.map((run) => `${run.u_colours[0]} to ${run.u_colours[1]} and more`);
const ofU = new Set(ranges).size < 2 ? ` · u ${ranges[0]}` : ranges.map((range, k) => ` · u of ${"AB"[k]} ${range}`).join("");
$("legend").append(made("span", {}, scale, ` CAM 0 to 1${ofU}`));
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", (event) => { if (event.target.id === "opacity") { look(); keep(); } else show(); });
addEventListener("hashchange", () => { restore(); show(); });
$("filters").open = matchMedia("(min-width: 701px)").matches;
restore();
show();
