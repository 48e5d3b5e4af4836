// Signals as colours and curves: scale, legend, and the strip over a response.

// Equal steps of lightness, told apart by all eyes: YlGnBu on white, cividis on black; the signed
// ones blue to orange around the page's own colour.
const RAMPS = {
  light: {
    plain: ["#ffffff00", "#eef8c4", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#0c2c84"],
    signed: ["#2166ac", "#67a9cf", "#c3dcec", "#ffffff00", "#fbd9b0", "#f1a340", "#b35806"],
  },
  dark: {
    plain: ["#00224e00", "#13316e", "#35456c", "#575d6d", "#7d7c78", "#a59c74", "#d3c064", "#fee838"],
    signed: ["#74b9f0", "#3f86bf", "#1f4464", "#00000000", "#6b3d10", "#c47a22", "#fdb863"],
  },
};
const DARK = matchMedia("(prefers-color-scheme: dark)");
const SHAPES = { reverse_kl: "root", forward_kl: "root", engine_mismatch: "signed" };
const SHAPE_TEXTS = { linear: "", root: ", square-root scale", signed: ", around 0" };
const STEPS = 48;
const LEAST_TOPS = { engine_mismatch: 1e-3 };  // nats: what is below them is rounding

function hasThreshold(name) {
  return THRESHOLD !== null && ["teacher_entropy", "student_entropy"].includes(name);
}

function channels(colour) {
  const parts = colour.slice(1).match(/../g).map((part) => parseInt(part, 16));
  return parts.length === 3 ? [...parts, 255] : parts;
}

// `count` colours along a ramp, each {back, front}: front is what can be read on it.
function stepsOf(stops, count) {
  const points = stops.map(channels);
  const page = DARK.matches ? [20, 22, 26] : [255, 255, 255];
  return Array.from({ length: count }, (_, n) => {
    const at = (n / (count - 1)) * (points.length - 1);
    const low = Math.min(Math.floor(at), points.length - 2);
    const mixed = points[low].map((value, c) => value + (points[low + 1][c] - value) * (at - low));
    const seen = page.map((value, c) => value + (mixed[c] - value) * (mixed[3] / 255));
    const light = (0.2126 * seen[0] + 0.7152 * seen[1] + 0.0722 * seen[2]) / 255;
    return { back: `rgb(${seen.map(Math.round).join(" ")})`, front: light > 0.5 ? "#111" : "#fff" };
  });
}

function isInfinite(value) {
  return Math.abs(value) === Infinity;
}

// The 99.5th percentile of the finite sizes, rounded up: single tokens beyond it do not pale the others.
function topOf(name) {
  if (name === "gate") return 1;
  const values = COLUMNS[name];
  const stride = Math.max(1, Math.floor(values.length / 50_000));
  const sizes = [];
  for (let n = 0; n < values.length; n += stride) {
    if (Number.isFinite(values[n])) sizes.push(Math.abs(values[n]));
  }
  if (!sizes.length) return values.some(isInfinite) ? 1 : NaN;
  sizes.sort((a, b) => a - b);
  let top = sizes[Math.floor(0.995 * (sizes.length - 1))];
  if (hasThreshold(name)) top = Math.max(top, 1.25 * THRESHOLD);
  top = Math.max(top, LEAST_TOPS[name] ?? 1e-6);
  const unit = 10 ** Math.floor(Math.log10(top));
  return unit * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((each) => each * unit >= top * (1 - 1e-9));
}

// Of one signal: where a value stands (0 to 1; signed: −1 to 1), and its colour.
function makeScale(name) {
  const top = topOf(name);
  const shape = SHAPES[name] ?? "linear";
  const isSigned = shape === "signed";
  const ramp = RAMPS[DARK.matches ? "dark" : "light"][isSigned ? "signed" : "plain"];
  const colours = stepsOf(ramp, STEPS + 1);
  const place = (value) => {
    const part = Math.min(Math.max(value / top, isSigned ? -1 : 0), 1);
    return shape === "root" ? Math.sqrt(part) : part;
  };
  const colour = (value) => {
    const part = isSigned ? (place(value) + 1) / 2 : place(value);
    return colours[Math.round(part * STEPS)];
  };
  const hasInfinite = COLUMNS[name].some(isInfinite);
  return { name, top, shape, isSigned, place, colour, colours, hasInfinite };
}

// As many digits as a signal is told with.
function figure(name, value) {
  if (value === undefined || Number.isNaN(value)) return "unknown";
  if (isInfinite(value)) return value > 0 ? "∞" : "−∞";
  if (name === "gate") return Number.isInteger(value) ? `${value}` : value.toFixed(3);
  if (name === "engine_mismatch" && value !== 0 && Math.abs(value) < 1e-3) {
    return value.toExponential(2).replace("-", "−").replace("e-", "e−");
  }
  return value.toFixed(4).replace("-", "−");
}

// Whether a run's values of a signal are at least so large, and not just so large.
function isBound(name, side) {
  return PAGE.sides[side].lower_bounds.includes(name);
}

// A value, as `form` tells it; "unknown" and "∞" are no bounds.
function bounded(name, side, value, form = figure) {
  return isBound(name, side) && Number.isFinite(value) ? `at least ${form(name, value)}` : form(name, value);
}

function meanText(name, side, found, form = figure) {
  if (!found.infinite) return bounded(name, side, found.mean, form);
  const told = Number.isNaN(found.mean) ? "none finite" : bounded(name, side, found.mean, form);
  return `${told} (${found.infinite.toLocaleString("en")} infinite)`;
}

function hasGate(side) {
  return PAGE.sides[side].has_gate;
}

// "label value" of a mean; where the objective has no gate, its share is no finding.
function toldMean(name, side, found, form = figure) {
  if (name === "gate" && !hasGate(side)) return "no gate";
  return `${PAGE.signals[name].label} ${meanText(name, side, found, form)}`;
}

// Of all runs on the page.
function labelOf(name) {
  const { label } = PAGE.signals[name];
  const bounds = PAGE.sides.map((_, side) => side).filter((side) => isBound(name, side));
  if (!bounds.length) return label;
  return bounds.length === PAGE.sides.length ? `${label}, at least` : `${label}, of ${sideName(bounds[0])} at least`;
}

function explanationOf(name) {
  const { text } = PAGE.signals[name];
  const parts = "; at least: of the teacher's top k and one part of all other tokens";
  return labelOf(name) === PAGE.signals[name].label ? text : text + parts;
}

function brief(value) {
  return `${parseFloat(value.toPrecision(2))}`.replace("-", "−");
}

function paintToken(span, value, scale) {
  const isKnown = !Number.isNaN(value);
  span.classList.toggle("unknown", !isKnown);
  span.classList.toggle("infinite", isInfinite(value));
  const { back, front } = isKnown ? scale.colour(value) : { back: "", front: "" };
  span.style.backgroundColor = back;
  span.style.color = front;
}

function drawLegend(element, scale) {
  const { unit } = PAGE.signals[scale.name];
  const anyGate = PAGE.sides.some((side) => side.has_gate);
  const what = make("span", {}, make("b", {}, labelOf(scale.name)), ` (${unit}${SHAPE_TEXTS[scale.shape]})`);
  element.replaceChildren(what);
  if (scale.name === "gate" && !anyGate) {
    element.append("the objective has no gate");
  } else if (Number.isNaN(scale.top)) {
    element.append("unknown on this page");
  } else {
    const bar = make("span", { class: "ramp" });
    bar.style.background = `linear-gradient(90deg, ${scale.colours.map((c) => c.back).join(", ")})`;
    const shares = scale.isSigned ? [-1, 0, 1] : [0, 0.25, 0.5, 0.75, 1];
    for (const share of shares) {
      const value = scale.shape === "root" ? share * share * scale.top : share * scale.top;
      const end = Math.abs(share) === 1 && scale.name !== "gate" ? (share < 0 ? "≤ " : "≥ ") : "";
      const tick = make("span", {}, end + brief(value));
      tick.style.left = `${(scale.isSigned ? (share + 1) / 2 : share) * 100}%`;
      bar.append(tick);
    }
    if (hasThreshold(scale.name)) {
      const mark = make("span", { class: "tau", title: `τ = ${THRESHOLD} nats` }, "τ");
      mark.style.left = `${scale.place(THRESHOLD) * 100}%`;
      bar.append(mark);
    }
    element.append(bar);
  }
  const hatch = make("span", { class: "unknown swatch" });
  element.append(hatch, " unknown ");
  if (anyGate) element.append(make("span", { class: "gated swatch" }, "ab"), " gate > 0");
  if (scale.hasInfinite) element.append(make("span", { class: "infinite swatch" }, "∞"), " infinite");
  element.title = explanationOf(scale.name);
}

// Columns of a strip → [lowest, highest] value of the tokens in each; null of none.
function extremes(values, columns) {
  const found = Array.from({ length: columns }, () => null);
  values.forEach((value, t) => {
    if (Number.isNaN(value)) return;
    const from = Math.floor((t * columns) / values.length);
    const to = Math.max(from + 1, Math.floor(((t + 1) * columns) / values.length));
    for (let x = from; x < to; x++) {
      const old = found[x];
      found[x] = old ? [Math.min(old[0], value), Math.max(old[1], value)] : [value, value];
    }
  });
  return found;
}

// The signal over the positions of a response; `marked`: a token's position, or −1.
function drawStrip(canvas, values, scale, marked) {
  const ratio = devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (!width) return;
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext("2d");
  const colour = (name) => getComputedStyle(document.body).getPropertyValue(name);
  const y = (value) => scale.isSigned
    ? height / 2 - (scale.place(value) * (height - 2)) / 2 : height - 1 - scale.place(value) * (height - 2);
  const zero = scale.isSigned ? height / 2 : height - 1;
  extremes(values, width).forEach((pair, x) => {
    if (pair === null) {
      pen.fillStyle = colour("--hatch");
      if ((x / ratio) % 4 < 1) pen.fillRect(x, 0, 1, height);
      return;
    }
    const far = Math.abs(pair[0]) > Math.abs(pair[1]) ? pair[0] : pair[1];
    const top = Math.min(y(pair[1]), zero - 1), bottom = Math.max(y(pair[0]), zero);
    pen.fillStyle = colour("--curve");
    pen.fillRect(x, top, 1, bottom - top);
    pen.fillStyle = scale.colour(far).back;
    pen.fillRect(x, top + ratio, 1, Math.max(0, bottom - top - ratio));
  });
  if (hasThreshold(scale.name)) {
    pen.strokeStyle = colour("--accent");
    pen.setLineDash([4 * ratio, 3 * ratio]);
    pen.beginPath();
    pen.moveTo(0, y(THRESHOLD));
    pen.lineTo(width, y(THRESHOLD));
    pen.stroke();
    pen.setLineDash([]);
  }
  if (marked >= 0) {
    pen.fillStyle = colour("--accent");
    pen.fillRect(Math.floor(((marked + 0.5) / values.length) * width - ratio), 0, 2 * ratio, height);
  }
}
