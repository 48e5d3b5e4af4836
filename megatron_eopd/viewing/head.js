// The page's head: what was recorded, and the buttons, filters and help.

const KEYS = [
  ["1 … 6", "colour by a signal"], ["j, k", "next, previous response in the list"],
  ["←, →", "previous, next sibling: a response to the same prompt"],
  ["/", "search"], ["Enter, n, N", "next match, next, previous"], ["i", "ids of the tokens"],
  ["c", "the other run, of --compare"], ["Esc", "let go of a token"], ["?", "this help"],
];

// Over the tokens of a run's responses.
function meanOfSide(side, name) {
  const own = responses.filter((response) => response.side === side);
  if (!own.length) return meanOf([]);
  const from = own[0].start, to = own.at(-1).start + own.at(-1).length;
  return meanOf(COLUMNS[name].subarray(from, to));
}

function countsText() {
  const s = PAGE.summary;
  const counts = {
    prompts: s.num_prompts, responses: s.num_responses, tokens: s.num_tokens,
    "cut off": s.num_truncated, references: s.num_references,
  };
  const texts = Object.entries(counts).map(([word, value]) => `${value.toLocaleString("en")} ${word}`);
  if (s.num_graded) texts.push(`${s.num_right} of ${s.num_graded} right`);
  return texts.join(", ");
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
  const mean = (name) => meanText(name, side, meanOfSide(side, name));
  const means = SIGNALS.map((name) => `${PAGE.signals[name].label} ${mean(name)}`);
  return {
    objective: `${about.objective}, gate ${about.gate}, τ = ${about.threshold ?? "none"} nats, `
      + `payload ${about.payload}`,
    models: `${about.student} ← ${teachers.join(", ")}`,
    weights: `version ${about.iteration} of the student; sampled at temperature ${about.temperature}`,
    means: means.join(", "),
  };
}

function drawHead() {
  const { about, name } = PAGE.sides[0];
  const other = PAGE.sides[1];
  const what = about.task ? `evaluation ${about.iteration}, ${about.task}` : `iteration ${about.iteration}`;
  const small = (begin, text) => addParts(make("small", {}, begin), partsOfText(text));
  $("title").append(addParts(make("span"), partsOfText(name)), small(" ", what));
  if (other) $("title").append(small(" beside B: ", `${other.name}, ${other.about.iteration}`));
  const megabytes = `${(DATA_BLOCK.dataset.bytes / 1e6).toFixed(1)} MB`;
  const brief = PAGE.sides.map((_, side) => {
    const told = (name) => meanText(name, side, meanOfSide(side, name), figureBrief);
    const mean = (name) => `${PAGE.signals[name].label} ${told(name)}`;
    return `${sideName(side)} ${["gate", "reverse_kl", "forward_kl"].map(mean).join(" · ")}`;
  });
  const first = addParts(make("span"), partsOfText(`${about.objective} · τ ${about.threshold ?? "none"}`));
  $("facts").querySelector("summary").append(first, ` · ${countsText()} · ${brief.join(" · ")} · ${megabytes}`);
  const facts = PAGE.sides.flatMap((side, n) =>
    Object.entries(factsOfSide(side, n)).map(([term, text]) => [`${term} ${sideName(n)}`, text]));
  facts.push(["counts", countsText()], ["alternatives", alternativesText()]);
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
  const note = "Underlined tokens have a gate above 0. Dimmed ones are shared with a sibling; "
    + "◆ is the first that is not.";
  const close = make("button", { click: showHelp }, "close");
  $("help").append(make("h2", {}, "Keys"), make("dl", {}, ...keys), make("p", {}, note), close);
}
