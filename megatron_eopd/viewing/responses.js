// Prompts and responses as text. Only what is near the viewport has its tokens in the document.

const LINE_PX = 22;
const CHAR_PX = 7.4;
const FORK_BEFORE = 16, FORK_AFTER = 24;  // tokens around the one at which siblings part

// `element` gets its content by fill(element) when it comes near, and loses it when it is far.
const fillers = new Map();
const nearby = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) (isIntersecting ? fill : empty)(target);
}, { rootMargin: "1200px 0px" });

function lazily(element, height, filler) {
  element.estimate = Math.round(height);
  element.style.minHeight = `${element.estimate}px`;
  fillers.set(element, filler);
  nearby.observe(element);
  return element;
}

function fill(element) {
  if (element.isFilled) return;
  element.isFilled = true;
  fillers.get(element)(element);
  element.style.minHeight = "";
}

function empty(element) {
  if (!element.isFilled) return;
  // What is hidden has no height, and without one all of it would be near when it is shown again.
  element.style.minHeight = `${element.offsetHeight || element.estimate}px`;
  element.isFilled = false;
  element.replaceChildren();
  element.onEmpty?.();
}

function heightOf(tokens) {
  const width = Math.max(300, document.getElementById("main").clientWidth - 40);
  return Math.ceil((tokens * 4.2 * CHAR_PX) / width) * LINE_PX;
}

function nameOf(response) {
  const side = PAGE.sides.length > 1 ? `${sideName(response.side)} ` : "";
  return `${side}prompt ${PAGE.prompts[response.prompt].index}, sample ${response.sample_index}`;
}

function badgesOf(response) {
  const texts = [
    PAGE.sides.length > 1 && ["side", sideName(response.side)],
    response.isTruncated && ["bad", "cut off"],
    response.isReference && ["info", "reference"],
    response.verdict && [response.isWrong ? "bad" : "good", response.verdict],
  ];
  const badge = ([kind, text]) => addParts(make("span", { class: `badge ${kind}` }), partsOfText(text));
  return texts.filter(Boolean).map(badge);
}

// Spans of tokens, each with what it shows; the reader goes from one to the next.
function tokenSpans(ids) {
  const read = makeReader();
  return Array.from(ids, (id) => {
    const { parts } = read(PIECES.get(id) ?? NO_PIECE);
    return addParts(make("span", { class: "t", "data-id": id }), parts, true);
  });
}

function promptElement(group) {
  const prompt = PAGE.prompts[group.prompt];
  const element = make("div", { class: "prompt" });
  return lazily(element, heightOf(PAGE.prompt_lengths[group.prompt]) + 60, () => {
    const begin = group.promptStart;
    const ids = COLUMNS.prompt_ids.subarray(begin, begin + PAGE.prompt_lengths[group.prompt]);
    const isKnown = ids.every((id) => PIECES.has(id));
    const text = make("div", { class: "text" });
    if (isKnown) text.append(...tokenSpans(ids));
    else addParts(text, partsOfText(prompt.text), true);
    const fact = (name, told) => told ? addParts(make("span", {}, ` · ${name} `), partsOfText(told)) : null;
    const hasTeachers = PAGE.sides.some((side) => Object.keys(side.about.teachers).length > 1);
    const facts = [fact("answer", prompt.answer), fact("teacher", hasTeachers ? prompt.teacher : "")];
    const title = make("h2", {}, `prompt ${prompt.index}`, make("small", {}, ` ${ids.length} tokens`, ...facts));
    element.append(title, text);
    if (prompt.read_by_teacher) {
      const read = addParts(make("div", { class: "text" }), partsOfText(prompt.read_by_teacher), true);
      element.append(make("details", {}, make("summary", {}, "what the teacher reads in its place"), read));
    }
    const forks = forkTable(group);
    if (forks) element.append(forks);
  });
}

// One line of the prompt, in sight while the prompt is not.
const inSight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) target.parentElement?.classList.toggle("past", !isIntersecting);
});

function reminderOf(group) {
  const prompt = PAGE.prompts[group.prompt];
  inSight.observe(group.head);
  const line = prompt.text.slice(0, 400).replace(/\s+/g, " ").trim();
  return addParts(make("div", { class: "reminder" }, make("b", {}, `prompt ${prompt.index} `)), partsOfText(line));
}

// Siblings around the token at which each leaves the one that it follows for longest.
function forkTable(group) {
  const shown = group.filter(isShown);
  if (shown.length < 2) return null;
  const caption = make("caption", {}, "where each leaves the sibling that it follows for longest");
  const equals = Map.groupBy(shown, (response) => idsOf(response).join());
  const rows = Array.from(equals.values(), (alike) => forkRow(alike, shown));
  const longest = Math.max(...Array.from(equals.values(), (alike) => namesOf(alike).length));
  for (const row of rows) row.firstChild.style.width = `${Math.min(longest, 12) + 2}ch`;
  return make("table", { class: "forks" }, caption, ...rows);
}

function namesOf(alike) {
  return alike.map(shortName).join(" = ");
}

// `alike`: responses of the same tokens.
function forkRow(alike, shown) {
  const response = alike[0];
  const fork = nearest(response, shown.filter((sibling) => !alike.includes(sibling)));
  const at = fork?.length ?? 0;
  const jump = () => goTo(response, Math.min(at, response.length - 1));
  const ids = idsOf(response);
  const spans = tokenSpans(ids.subarray(0, at + FORK_AFTER));
  const from = Math.max(0, at - FORK_BEFORE);
  const names = make("th", {}, namesOf(alike));
  const attributes = { click: jump, tabindex: 0, keydown: (event) => event.key === "Enter" && jump() };
  if (fork === null) return make("tr", attributes, names, make("td", {}, "the same tokens"));
  return make("tr", attributes, names,
    make("td", { class: "before" }, make("span", {}, from > 0 ? "…" : "", ...spans.slice(from, at))),
    make("td", { class: "after" }, make("span", {}, ...spans.slice(at), spans.length < ids.length ? "…" : "")),
    make("td", { class: "as" }, at ? `after ${at}, as ${shortName(fork.sibling)}` : "at once"));
}

function shortName(response) {
  return `${sideName(response.side)}${response.sample_index}`;
}

function isSame(response, fork) {
  return fork.length === response.length && fork.length === fork.sibling.length;
}

function forkOf(response) {
  return nearest(response, response.group.filter(isShown));
}

function responseElement(response) {
  const element = make("article", { class: "response", "data-n": response.n });
  element.addEventListener("click", () => choose(response));
  element.onEmpty = () => { response.spans = null; response.canvas = null; };
  response.element = element;
  return lazily(element, heightOf(response.length) + 100, () => {
    const canvas = make("canvas", { class: "strip", title: "the signal over the positions; click to go there" });
    canvas.addEventListener("click", (event) => {
      const share = event.offsetX / canvas.clientWidth;
      goTo(response, Math.min(response.length - 1, Math.floor(share * response.length)));
    });
    response.spans = tokenSpans(idsOf(response));
    response.canvas = canvas;
    const text = make("div", { class: "text" }, ...response.spans);
    element.append(headOf(response), canvas, text);
    response.spans.forEach((span, t) => {
      span.n = t;
      span.classList.toggle("gated", hasGate(response.side) && COLUMNS.gate[response.start + t] > 0);
    });
    markPrefix(response);
    paint(response);
    if (state.pinned?.response === response) response.spans[state.pinned.position].classList.add("pinned");
  });
}

function headOf(response) {
  const mean = (name) => toldMean(name, response.side, response.means[name]);
  const means = ["gate", "reverse_kl", "forward_kl"].map(mean).join(" · ");
  const steps = response.step ? ` · ${response.step} steps old` : "";
  const facts = ` ${response.length.toLocaleString("en")} tokens${steps} · means: ${means} `;
  const told = make("small", {}, facts);
  return make("h3", {}, nameOf(response), " ", ...badgesOf(response), told, forkButton(response));
}

function forkButton(response) {
  const fork = forkOf(response);
  if (!fork?.length) return null;
  const sibling = shortName(fork.sibling);
  const tokens = fork.length === 1 ? "1 token" : `${fork.length} tokens`;
  const text = isSame(response, fork) ? `the same as ${sibling}` : `as ${sibling} for ${tokens} ◆`;
  const title = `it begins as ${nameOf(fork.sibling)}, for ${tokens}; no other sibling is like it for longer. `
    + "A click leads to where they part";
  const jump = (event) => {
    event.stopPropagation();
    goTo(response, Math.min(fork.length, response.length - 1));
  };
  return make("button", { class: "jump", title, click: jump }, text);
}

// What a sibling has too is dimmed; the first token that is this one's own is marked.
function markPrefix(response) {
  const fork = forkOf(response);
  response.spans.forEach((span, t) => {
    span.classList.toggle("same", fork !== null && t < fork.length);
    span.classList.toggle("fork", fork !== null && t === fork.length && t > 0);
  });
}

function paint(response) {
  if (!response.spans) return;
  const values = COLUMNS[state.signal].subarray(response.start, response.start + response.length);
  response.spans.forEach((span, t) => paintToken(span, values[t], state.scale));
  markHits(response);
  paintStrip(response);
}

function paintStrip(response) {
  if (!response.canvas) return;
  const values = COLUMNS[state.signal].subarray(response.start, response.start + response.length);
  const marked = state.pinned?.response === response ? state.pinned.position : -1;
  drawStrip(response.canvas, values, state.scale, marked);
}

function markHits(response) {
  if (!response.spans) return;
  for (const span of response.spans) span.classList.remove("hit");
  for (const [from, to] of hitsIn(response)) {
    for (let t = from; t <= to; t++) response.spans[t].classList.add("hit");
  }
}

// The characters of a response, and where those of each token begin.
function searchable(response) {
  if (!response.searchable) {
    const read = makeReader();
    const begins = new Int32Array(response.length);
    let text = "";
    idsOf(response).forEach((id, t) => {
      begins[t] = text.length;
      text += read(PIECES.get(id) ?? NO_PIECE).text;
    });
    response.searchable = { text: text.toLowerCase(), begins };
  }
  return response.searchable;
}

// [first, last] token of each match of the query in a response.
function hitsIn(response) {
  const query = state.query;
  if (!query) return [];
  if (response.hits?.query === query) return response.hits.found;
  const { text, begins } = searchable(response);
  const found = [];
  let t = 0;
  for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
    while (t + 1 < begins.length && begins[t + 1] <= at) t++;
    let last = t;
    while (last + 1 < begins.length && begins[last + 1] < at + query.length) last++;
    found.push([t, last]);
  }
  response.hits = { query, found };
  return found;
}
