// The page's head: what was recorded, and the buttons, filters and help.

const KEYS = [
  ["1 … 6", "colour by a signal"], ["j, k", "next, previous response in the list"],
  ["←, →", "previous, next sibling: a response to the same prompt"],
  ["/", "search"], ["Enter, n, N", "next match, next, previous"], ["i", "ids of the tokens"],
  ["c", "the other run, of --compare"], ["Esc", "let go of a token"], ["?", "this help"],
];

const WORDS = [
  ["5449.0", "sample 0 of prompt 5449, counted from 0 in the prompt set or the task"],
  ["gate, rkl, fkl", "means over a response: gate, reverse KL, forward KL; ≥: at least; ×∞: infinite values"],
  ["as 2 for 5 tokens ◆", "the first 5 tokens are those of sample 2, which no other sibling follows for longer"],
  ["A2 = B2", "the same tokens from the first to the last"],
  ["rank", "1: the model's most probable token"],
];

// Over the tokens of a run's responses.
function meanOfSide(side, name) {
  const own = ofSide(side);
  if (!own.length) return meanOf([]);
  const from = own[0].start, to = own.at(-1).start + own.at(-1).length;
  return meanOf(COLUMNS[name].subarray(from, to));
}

function ofSide(side) {
  return responses.filter((response) => response.side === side);
}

function countsText(side) {
  const own = ofSide(side);
  const counts = {
    prompts: new Set(own.map((response) => response.prompt)).size,
    responses: own.length,
    tokens: own.reduce((sum, response) => sum + response.length, 0),
    "cut off": own.filter((response) => response.isTruncated).length,
    references: own.filter((response) => response.isReference).length,
  };
  const texts = Object.entries(counts).map(([word, value]) => `${value.toLocaleString("en")} ${word}`);
  return [...texts, ...rightText(side)].join(", ");
}

// ["3 of 8 right"], or nothing where nothing was graded.
function rightText(side) {
  const graded = ofSide(side).filter((response) => response.verdict);
  const right = graded.filter((response) => !response.isWrong).length;
  return graded.length ? [`${right} of ${graded.length} right`] : [];
}

function objectiveText(side) {
  const { objective, threshold } = PAGE.sides[side].about;
  return `${objective} · ${hasGate(side) ? `τ ${threshold ?? "none"}` : "no gate"}`;
}

function alternativesText() {
  const kept = PAGE.alternatives_kept, recorded = PAGE.summary.num_alternatives;
  const isNotable = PAGE.sides[0].about.top_tokens === "notable";
  const where = isNotable ? `where H ≥ τ or reverse KL ≥ ${PAGE.notable_kl} nats` : "everywhere";
  const text = `of ${kept.toLocaleString("en")} tokens, top ${PAGE.top} of each model, ${where}`;
  if (kept === recorded) return text;
  return `${text}; the highest teacher entropies of the ${recorded.toLocaleString("en")} recorded`;
}

// Term → text, of one run.
function factsOfSide({ about }, side) {
  const teachers = Object.entries(about.teachers).map(([name, model]) => `${name}: ${model}`);
  const means = SIGNALS.map((name) => toldMean(name, side, meanOfSide(side, name)));
  return {
    objective: `${about.objective}, gate ${about.gate}, τ = ${about.threshold ?? "none"} nats, `
      + `payload ${about.payload}`,
    models: `${about.student} ← ${teachers.join(", ")}`,
    weights: `version ${about.iteration} of the student; sampled at temperature ${about.temperature}`,
    counts: countsText(side),
    means: means.join(", "),
  };
}

function briefOfSide(side) {
  const names = hasGate(side) ? ["gate", "reverse_kl", "forward_kl"] : ["reverse_kl", "forward_kl"];
  const means = names.map((name) => toldMean(name, side, meanOfSide(side, name), figureBrief));
  // Of two runs the counts are alike but for what is right.
  const counts = other() ? rightText(side) : [countsText(side)];
  const begin = other() ? `${sideName(side)}: ` : "";
  return begin + [objectiveText(side), ...counts, ...means].join(" · ");
}

function other() {
  return PAGE.sides[1];
}

function drawLinks() {
  for (const [text, href] of Object.entries(PAGE.links)) $("links").append(make("a", { href }, text));
}

function drawHead() {
  drawLinks();
  const { about, name } = PAGE.sides[0];
  const what = about.task ? `evaluation ${about.iteration}, ${about.task}` : `iteration ${about.iteration}`;
  const small = (begin, text) => addParts(make("small", {}, begin), partsOfText(text));
  $("title").append(addParts(make("span"), partsOfText(name)), small(" ", what));
  if (other()) $("title").append(small(" beside B: ", `${other().name}, ${other().about.iteration}`));
  const megabytes = `${(DATA_BLOCK.dataset.bytes / 1e6).toFixed(1)} MB`;
  const briefs = PAGE.sides.map((_, side) =>
    addParts(make("span", { class: "brief" }), partsOfText(briefOfSide(side))));
  $("facts").querySelector("summary").append(...briefs, `· ${megabytes}`);
  const facts = PAGE.sides.flatMap((side, n) =>
    Object.entries(factsOfSide(side, n)).map(([term, text]) => [`${term} ${sideName(n)}`, text]));
  facts.push(["alternatives", alternativesText()]);
  facts.push(["page", `${megabytes}; values to 0.0001; means over the tokens at which a value is known and finite`]);
  for (const [term, text] of facts) {
    $("facts").querySelector("dl").append(make("dt", {}, term), addParts(make("dd"), partsOfText(text)));
  }
}

function keyButton(key, text, attributes) {
  return make("button", attributes, make("kbd", {}, key), ` ${text}`);
}

function drawControls() {
  PAGE.colours.forEach((name, n) => {
    const attributes = { "data-signal": name, title: explanationOf(name), click: () => colourBy(name) };
    $("signals").append(keyButton(`${n + 1}`, labelOf(name), attributes));
  });
  const ids = { id: "ids", "aria-pressed": "false", title: "ids of the tokens", click: toggleIds };
  const compare = { id: "compare", "aria-pressed": "true", title: "the other run's responses", click: toggleB };
  $("switches").append(keyButton("i", "ids", ids), keyButton("?", "keys", { title: "keys", click: showHelp }));
  if (PAGE.sides.length > 1) $("switches").prepend(keyButton("c", "B", compare));
  drawFilters();
  drawHelp();
}

function drawFilters() {
  $("sort").append(...Object.keys(SORTS).map((name) => make("option", {}, name)));
  $("sort").addEventListener("change", () => { state.sort = $("sort").value; refresh(); });
  for (const name of Object.keys(FILTERS)) {
    // All right is a finding, and nothing graded is none.
    const isAsked = name === "wrong" ? responses.some((each) => each.verdict) : responses.some(FILTERS[name]);
    if (!isAsked) continue;
    const toggle = () => { state.filters[box.checked ? "add" : "delete"](name); refresh(); };
    const box = make("input", { type: "checkbox", name, change: toggle });
    $("filters").append(make("label", {}, box, ` ${name}`));
  }
  let waiting = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => search($("search").value), 120);
  });
}

function drawHelp() {
  const keys = KEYS.flatMap(([key, text]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, text)]);
  const signals = SIGNALS.map((name) => [PAGE.signals[name].label, explanationOf(name)]);
  const words = [...signals, ...WORDS].flatMap(([word, text]) => [make("dt", {}, word), make("dd", {}, text)]);
  const note = "Underlined tokens have a gate above 0. Dimmed ones are shared with a sibling; "
    + "◆ is the first that is not.";
  const close = make("button", { click: showHelp }, "close");
  // The button has the focus, and what has it is scrolled to.
  $("help").append(close, make("h2", {}, "Keys"), make("dl", {}, ...keys),
    make("h2", {}, "Words"), make("dl", {}, ...words), make("p", {}, note));
}
