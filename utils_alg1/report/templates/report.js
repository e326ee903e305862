// Draws the curves of the page's JSON as SVG, each chart as wide as its place on the page.

// Of each line: its name, its class in report.css and its metric.
const CHARTS = [
  {
    title: "Loss",
    unit: "nats per character, over the steps",
    isOfLosses: true,
    lines: [
      ["train, each step", "each", "loss/train_step"],
      ["train", "train", "loss/train"],
      ["val", "val", "loss/val"],
      ["best", "best", "best"],
    ],
  },
  { title: "Learning rate", unit: "", lines: [["", "train", "learning_rate"]] },
  { title: "Gradient norm", unit: "", lines: [["", "train", "gradient_norm"]] },
  { title: "Speed", unit: "characters per second", lines: [["", "train", "tokens_per_second"]] },
];
const MARK_WIDTH = 64; // pixels of the label of a mark

/** Returns round numbers from `low` to `high`: about `count`, `minStep` or more apart; `low` alone if it is as good as `high`. */
function ticks(low, high, count, minStep = 0) {
  if (isFlat(low, high)) return [low];
  const raw = Math.max((high - low) / count, minStep);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(step => step >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

/** Returns whether two numbers are too close for labels that tell them apart. */
function isFlat(low, high) {
  return !(high - low > 1e-4 * Math.max(Math.abs(low), Math.abs(high), 1e-100));
}

/** Formats tick values with as many digits as tell them apart: all plain, or all with a power of ten. */
function labels(values) {
  const exact = values.map(value => Number(value.toPrecision(values.length > 1 ? 12 : 5)));
  const largest = Math.max(...exact.map(Math.abs));
  if (largest && (largest < 0.001 || largest >= 1e9)) {
    return exact.map(value => (value ? value.toExponential().replace("e+", "e") : "0"));
  }
  const decimals = Math.max(...exact.map(value => (String(value).split(".")[1] ?? "").length));
  const digits = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
  return exact.map(value => (value ? value.toLocaleString("en", digits) : "0"));
}

/**
 * Draws a chart over the steps from 0 to `steps` into an <svg>; returns the step at a horizontal position.
 *
 * `references` are named values, drawn as level lines; `marks` are steps with a label, drawn as upright lines.
 */
function draw(svg, lines, steps, references = [], marks = []) {
  const { clientWidth: width, clientHeight: height } = svg;
  const values = [...lines.flatMap(line => line.points), ...references].map(([, value]) => value);
  const low = Math.min(...values);
  const high = Math.max(...values);
  const yTicks = ticks(low, high, height > 250 ? 7 : 5);
  const yLabels = labels(yTicks);
  const xTicks = ticks(0, steps, Math.max(2.5, width / 110), 1);
  const xLabels = labels(xTicks);

  const margin = isFlat(low, high) ? Math.abs(high) || 1 : 0.05 * (high - low);
  const left = Math.max(44, 12 + 7 * Math.max(...yLabels.map(label => label.length)));
  const right = width - 16;
  const top = 6;
  const bottom = height - 26;
  const x = step => left + ((right - left) * step) / steps;
  const y = value => bottom - ((bottom - top) * (value - low + margin)) / (high - low + 2 * margin);

  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  yTicks.forEach((value, i) => {
    add(svg, "path", { class: "grid", d: `M${left} ${y(value)}H${right}` });
    add(svg, "text", { x: left - 8, y: y(value), "text-anchor": "end", "dominant-baseline": "central" }, yLabels[i]);
  });
  xTicks.forEach((step, i) => add(svg, "text", { x: x(step), y: height - 6, "text-anchor": "middle" }, xLabels[i]));
  let labelled = 0; // up to where there is a label at the bottom, where losses seldom are
  for (const [step, name] of marks) {
    add(svg, "path", { class: "mark", d: `M${x(step)} ${top}V${bottom}` });
    const isLast = x(step) > right - MARK_WIDTH;
    if (x(step) - (isLast ? MARK_WIDTH : 0) < labelled) continue;
    const place = { x: x(step) + (isLast ? -4 : 4), y: bottom - 3, "text-anchor": isLast ? "end" : "start" };
    add(svg, "text", { class: "over", ...place }, name);
    labelled = x(step) + MARK_WIDTH;
  }
  for (const { kind, points } of lines) {
    const places = points.map(([step, value]) => [x(step).toFixed(1), y(value).toFixed(1)]);
    if (places.length > 1) add(svg, "polyline", { class: kind, points: places.join(" ") });
    else add(svg, "circle", { class: kind, cx: places[0][0], cy: places[0][1], r: 4.5 });
  }
  for (const [name, value] of references) {
    add(svg, "path", { class: "reference", d: `M${left} ${y(value)}H${right}` });
    add(svg, "text", { class: "over", x: right - 4, y: y(value) - 5, "text-anchor": "end" }, `${name} ${value.toFixed(2)}`);
  }
  return position => ((position - left) / (right - left)) * steps;
}

/** Returns the values of the curves nearest to a step, with the step of each. */
function valuesAt(lines, wanted) {
  const nearest = points => points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
  const curves = lines.filter(line => line.points.length > 1);
  const found = curves.map(line => [line.name, ...nearest(line.points)]);
  return found.map(([name, step, value]) => `${name} ${Number(value.toPrecision(5))} at step ${step}`).join(", ");
}

/** Adds a figure with a chart, its legend and a line that shows the values, and the mark, under the pointer. */
function addChart(parent, title, unit, lines, steps, references, marks) {
  const figure = add(parent, "figure");
  add(add(figure, "figcaption", {}, `${title} `), "small", {}, unit);
  const svg = add(figure, "svg", { role: "img", "aria-label": `${title} over the steps` });
  if (lines.length > 1) {
    const legend = add(figure, "ul", { class: "legend" });
    for (const { name, kind } of lines) add(legend, "li", { class: kind }, name);
  }
  const output = add(figure, "output");
  let stepAt = draw(svg, lines, steps, references, marks);
  new ResizeObserver(() => (stepAt = draw(svg, lines, steps, references, marks))).observe(svg);
  svg.addEventListener("pointermove", ({ offsetX }) => {
    const [from, to] = [stepAt(offsetX - 5), stepAt(offsetX + 5)];
    const marked = marks.filter(([step]) => from <= step && step <= to).map(([, , text]) => text);
    output.textContent = [valuesAt(lines, stepAt(offsetX)), ...marked].join("; ");
  });
  svg.addEventListener("pointerleave", () => (output.textContent = ""));
}

/** Colours characters by the losses, in nats, with which the model predicted them; `evenly` is that of a uniform guess. */
function showSurprise(parent, { characters, losses, evenly }) {
  const describe = i =>
    losses[i] === null
      ? `${label(characters[i])} is the first: nothing predicts it`
      : `${label(characters[i])} had a probability of ${percent(Math.exp(-losses[i]))}: ${losses[i].toFixed(2)} nats`;
  const shares = losses.map(loss => Math.min(1, loss / evenly));
  addCharacters(parent, "val", "held-out text by surprise", describe).show(characters, shares);
}

const { steps, curves, held_out: heldOut, ...extras } = JSON.parse(document.getElementById("data").textContent);
for (const { title, unit, lines, isOfLosses } of CHARTS) {
  const found = lines.map(([name, kind, metric]) => ({ name, kind, points: curves[metric] ?? [] }));
  const drawn = found.filter(line => line.points.length > 0);
  const { references, marks } = isOfLosses ? extras : { references: [], marks: [] };
  if (drawn.length) addChart(document.getElementById("charts"), title, unit, drawn, Math.max(steps, 1), references, marks);
}
if (heldOut) showSurprise(document.getElementById("held-out"), heldOut);
