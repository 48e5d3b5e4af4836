// What is chosen, the list of responses, and the keys.

const SORTS = {
  "as recorded": (a, b) => a.prompt - b.prompt || a.sample_index - b.sample_index || a.side - b.side,
  "most gated": (a, b) => falling(a.means.gate, b.means.gate),
  "worst reverse KL": (a, b) => falling(a.means.reverse_kl, b.means.reverse_kl),
  "worst forward KL": (a, b) => falling(a.means.forward_kl, b.means.forward_kl),
  longest: (a, b) => b.length - a.length,
};
const FILTERS = {
  "cut off": (response) => response.isTruncated,
  wrong: (response) => response.isWrong,
  reference: (response) => response.isReference,
};
const state = {
  signal: PAGE.signal, scale: null, sort: "as recorded", filters: new Set(), query: "",
  showsB: true, showsIds: false, current: null, pinned: null, shown: [], hit: null,
};
const $ = (id) => document.getElementById(id);
let responses = [];
let groups = [];

// Means: with most infinite values first, unknown last.
function falling(a, b) {
  const size = ({ mean }) => (Number.isNaN(mean) ? -Infinity : mean);
  return b.infinite - a.infinite || size(b) - size(a) || 0;
}

function isShown(response) {
  return state.showsB || response.side === 0;
}

// Groups of siblings, in the order of the prompts.
function makeGroups() {
  const byPrompt = new Map();
  for (const response of responses) {
    if (!byPrompt.has(response.prompt)) byPrompt.set(response.prompt, []);
    byPrompt.get(response.prompt).push(response);
  }
  const starts = [];
  let start = 0;
  PAGE.prompt_lengths.forEach((length) => { starts.push(start); start += length; });
  return Array.from(byPrompt, ([prompt, members]) => {
    members.sort((a, b) => a.sample_index - b.sample_index || a.side - b.side);
    const group = Object.assign(members, { prompt, promptStart: starts[prompt] });
    for (const response of members) response.group = group;
    group.head = promptElement(group);
    group.element = make("section", {}, group.head, reminderOf(group), ...members.map(responseElement));
    return group;
  });
}

function matches(response) {
  if (!isShown(response)) return false;
  for (const name of state.filters) if (!FILTERS[name](response)) return false;
  if (!state.query) return true;
  const prompt = PAGE.prompts[response.prompt].text.toLowerCase();
  return prompt.includes(state.query) || hitsIn(response).length > 0;
}

// The list and the page, after a change of order, filter, search or run.
function refresh() {
  state.shown = responses.filter(matches).sort(SORTS[state.sort]);
  const shown = new Set(state.shown);
  $("list").replaceChildren(...state.shown.map(listItem));
  const order = [...new Set(state.shown.map((response) => response.group))];
  for (const group of order) {
    for (const response of group) response.element.hidden = !shown.has(response);
  }
  $("main").replaceChildren(...order.map((group) => group.element));
  if (!order.length) $("main").append(make("p", { id: "nothing" }, "No response is like this."));
  $("count").textContent = `${state.shown.length} of ${responses.filter(isShown).length} responses`;
  if (!shown.has(state.current)) state.current = null;
  markCurrent();
}

function listItem(response) {
  const short = { ...(hasGate(response.side) ? { gate: "gate" } : {}), reverse_kl: "rkl", forward_kl: "fkl" };
  const means = Object.entries(short).map(([name, word]) => `${word} ${meanBrief(name, response)}`).join(" · ");
  const show = () => { choose(response); scrollTo(response); };
  const title = `${nameOf(response)}; means over the response: rkl reverse KL, fkl forward KL`;
  const item = make("li", { "data-n": response.n, title, click: show },
    make("span", {}, `${PAGE.prompts[response.prompt].index}.${response.sample_index}`), ...badgesOf(response),
    make("small", {}, `${response.length} tok · ${means}`));
  response.item = item;
  return item;
}

function figureBrief(name, value) {
  return Number.isNaN(value) ? "?" : value.toFixed(2);
}

// In the little room of the list.
function meanBrief(name, { means, side }) {
  const { mean, infinite } = means[name];
  const told = `${isBound(name, side) && !Number.isNaN(mean) ? "≥" : ""}${figureBrief(name, mean)}`;
  if (!infinite) return told;
  return Number.isNaN(mean) ? `${infinite}×∞` : `${told} ${infinite}×∞`;
}

function choose(response) {
  state.current = response;
  markCurrent();
}

function markCurrent() {
  for (const each of document.querySelectorAll(".current")) each.classList.remove("current");
  if (!state.current) return;
  state.current.element.classList.add("current");
  state.current.item?.classList.add("current");
  state.current.item?.scrollIntoView({ block: "nearest" });
}

// With its prompt, where both are in the window at once.
function scrollTo(response) {
  const { group, element } = response;
  const shown = [group.head, ...group.map((each) => each.element).filter((each) => !each.hidden)];
  // The end of the one before may be in sight too, and must not grow then.
  for (const each of [group.head, shown[shown.indexOf(element) - 1], element]) fill(each);
  const needed = element.getBoundingClientRect().bottom - group.head.getBoundingClientRect().top;
  const fits = needed <= Math.min($("main").clientHeight, innerHeight - $("nav").offsetHeight);
  (fits ? group.element : element).scrollIntoView({ block: "start" });
}

function goTo(response, position) {
  choose(response);
  fill(response.element);
  if (!response.length) return;
  pin(response, position);
  response.spans[position].scrollIntoView({ block: "center" });
}

function pin(response, position) {
  const before = state.pinned;
  state.pinned = { response, position };
  for (const each of document.querySelectorAll(".t.pinned")) each.classList.remove("pinned");
  response.spans?.[position].classList.add("pinned");
  drawPanel($("panel"), response, position, true);
  $("panel").classList.add("open");
  paintStrip(response);
  if (before && before.response !== response) paintStrip(before.response);
}

function unpin() {
  const before = state.pinned;
  state.pinned = null;
  for (const each of document.querySelectorAll(".t.pinned")) each.classList.remove("pinned");
  if (before) paintStrip(before.response);
  $("panel").classList.remove("open");
  showHint();
}

function showHint() {
  $("panel").replaceChildren(make("p", { class: "none" }, "Point at a token, or tap it to hold it here."));
}

// {response, position} of an event in a token; null elsewhere.
function tokenAt(event) {
  const span = event.target.closest?.("article .t");
  if (!span) return null;
  const response = responses[span.closest("article").dataset.n];
  return { response, position: span.n };
}

function colourBy(name) {
  state.signal = name;
  state.scale = makeScale(name);
  for (const button of $("signals").children) {
    button.setAttribute("aria-pressed", button.dataset.signal === name);
  }
  drawLegend($("legend"), state.scale);
  responses.forEach(paint);
  if (state.pinned) drawPanel($("panel"), state.pinned.response, state.pinned.position, true);
}

function step(list, by) {
  if (!list.length) return;
  const at = list.indexOf(state.current);
  const next = list[at < 0 ? 0 : Math.min(Math.max(at + by, 0), list.length - 1)];
  choose(next);
  scrollTo(next);
}

// All matches of the query in responses, in the order of the page.
function allHits() {
  const order = [...new Set(state.shown.map((response) => response.group))];
  const inOrder = order.flatMap((group) => group.filter((r) => !r.element.hidden));
  return inOrder.flatMap((response) => hitsIn(response).map(([position]) => ({ response, position })));
}

function search(text) {
  state.query = text.toLowerCase();
  state.hit = null;
  refresh();
  responses.forEach(markHits);
  const count = state.query ? allHits().length : 0;
  $("found").textContent = state.query ? `${count} matches in responses` : "";
}

function nextHit(by) {
  const hits = allHits();
  if (!hits.length) return;
  const first = by > 0 ? 0 : hits.length - 1;
  state.hit = state.hit === null ? first : (state.hit + by + hits.length) % hits.length;
  goTo(hits[state.hit].response, hits[state.hit].position);
  $("found").textContent = `match ${state.hit + 1} of ${hits.length}`;
}

function toggleIds() {
  state.showsIds = document.body.classList.toggle("ids");
  $("ids").setAttribute("aria-pressed", state.showsIds);
}

function toggleB() {
  if (PAGE.sides.length < 2) return;
  state.showsB = !state.showsB;
  $("compare").setAttribute("aria-pressed", state.showsB);
  if (state.pinned && !isShown(state.pinned.response)) unpin();
  // Whom a response follows, and the table of forks, are others now.
  for (const group of groups) {
    for (const element of [group.head, ...group.map((response) => response.element)]) empty(element);
  }
  refresh();
  for (const group of groups) {
    for (const element of [group.head, ...group.map((r) => r.element)]) {
      nearby.unobserve(element);
      nearby.observe(element);
    }
  }
  if (state.pinned) pin(state.pinned.response, state.pinned.position);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = event.target.matches("input, select");
  if (event.key === "Escape") {
    if (isTyping) event.target.blur();
    else unpin();
    return;
  }
  if (isTyping) {
    if (event.key === "Enter" && event.target.id === "search") {
      if ($("search").value.toLowerCase() !== state.query) search($("search").value);
      nextHit(event.shiftKey ? -1 : 1);
    }
    return;
  }
  const siblings = () => state.current ? state.current.group.filter((r) => !r.element.hidden) : state.shown;
  const actions = {
    j: () => step(state.shown, 1), k: () => step(state.shown, -1),
    ArrowRight: () => step(siblings(), 1), ArrowLeft: () => step(siblings(), -1),
    i: toggleIds, c: toggleB, "?": showHelp, n: () => nextHit(1), N: () => nextHit(-1),
    Enter: () => state.query && nextHit(1),
    "/": () => $("search").focus(),
  };
  PAGE.colours.forEach((name, n) => { actions[`${n + 1}`] = () => colourBy(name); });
  // Enter on a button is the button's.
  const isElements = event.key === "Enter" && event.target.matches("button, tr, summary");
  if (!actions[event.key] || isElements) return;
  event.preventDefault();
  actions[event.key]();
}

function showHelp() {
  if ($("help").open) $("help").close();
  else $("help").showModal();
}

function listen() {
  const main = $("main");
  main.addEventListener("mouseover", (event) => {
    const found = tokenAt(event);
    if (found && !state.pinned) drawPanel($("panel"), found.response, found.position, false);
  });
  main.addEventListener("click", (event) => {
    const found = tokenAt(event);
    if (!found) return;
    pin(found.response, found.position);
    // On narrow windows the panel opens over the text.
    found.response.spans[found.position].scrollIntoView({ block: "nearest" });
  });
  document.addEventListener("keydown", onKey);
  addEventListener("resize", () => responses.forEach(paintStrip));
  DARK.addEventListener("change", () => colourBy(state.signal));
}

async function start() {
  await readColumns();
  responses = makeResponses();
  state.scale = makeScale(state.signal);
  groups = makeGroups();
  drawHead();
  drawControls();
  refresh();
  colourBy(state.signal);
  showHint();
  listen();
  document.body.dataset.ready = "";
}

start().catch((error) => {
  $("main").replaceChildren(make("p", { id: "failed" }, `This page could not be read: ${error}`));
});
