// The panel of one token: its text, all signals with units, ranks, and the likely alternatives.

function row(label, ...cells) {
  return make("tr", {}, make("th", {}, label), ...cells.map((cell) => make("td", {}, cell)));
}

function tokenName(id) {
  return addParts(make("span", { class: "name" }), partsOfId(id));
}

function sideName(side) {
  return PAGE.sides.length > 1 ? "AB"[side] : "";
}

// The response of the other run that goes the same way for longest, {sibling, length}, and null
// where there is none.
function twinOf(response) {
  if (response.twin === undefined) {
    response.twin = nearest(response, response.group.filter((other) => other.side !== response.side));
  }
  return state.showsB ? response.twin : null;
}

function isPrintable(piece) {
  return makeReader()(piece).parts.every(([kind]) => kind === "text" || kind === "special");
}

function drawPanel(panel, response, position, isPinned) {
  const token = response.start + position;
  const id = COLUMNS.ids[token];
  const piece = PIECES.get(id) ?? NO_PIECE;
  const kind = piece.special ? "special token" : "token";
  const bytes = make("div", { class: "bytes", hidden: isPrintable(piece) }, `bytes ${hex(piece.bytes)}`);
  panel.replaceChildren(
    make("h2", {}, tokenName(id)),
    make("div", { class: "where" },
      `${kind} ${id} · position ${position} of ${response.length} · ${nameOf(response)}`,
      isPinned ? make("button", { title: "let go of this token (Esc)", click: unpin }, "×") : null),
    bytes,
    valuesTable(response, position),
    ...alternativeTables(response, token),
  );
}

function valuesTable(response, position) {
  const token = response.start + position;
  const twin = twinOf(response);
  const isShared = twin !== null && position <= twin.length && position < twin.sibling.length;
  const places = isShared ? [token, twin.sibling.start + position] : [token];
  if (response.side === 1) places.reverse();  // A is left of B
  const table = make("table", { class: isShared ? "values both" : "values" });
  if (isShared) {
    table.append(row("", make("b", {}, "A"), make("b", {}, "B"), ""));
    // After the same tokens, and hence from the same question to both models.
    const names = places.map((at) => tokenName(COLUMNS.ids[at]));
    if (position === twin.length) table.append(row("token", ...names, ""));
  }
  for (const name of SIGNALS) {
    const { label, unit } = PAGE.signals[name];
    const sideOf = (n) => (isShared ? n : response.side);
    const cells = places.map((at, n) => name === "gate" && !hasGate(sideOf(n))
      ? "no gate" : bounded(name, sideOf(n), COLUMNS[name][at]));
    const line = row(label, ...cells, name === "gate" ? "" : unit);
    line.title = explanationOf(name);
    line.dataset.signal = name;
    line.classList.toggle("chosen", name === state.signal);
    table.append(line);
  }
  for (const who of ["student", "teacher"]) {
    const ranks = places.map((at) => `${COLUMNS[`${who}_rank`][at] || "unknown"}`);
    const line = row(`rank in ${who}`, ...ranks, "");
    line.title = `1: the ${who}'s most probable token`;
    line.dataset.signal = `${who}_rank`;
    table.append(line);
  }
  return table;
}

// Of the models' likely tokens, where they are kept.
function alternativeTables(response, token) {
  const sampled = COLUMNS.ids[token];
  const found = alternativesOf(token);
  if (found === null) return [make("p", { class: "none" }, whyNone(response, token))];
  return ["teacher", "student"].map((who) => {
    const table = make("table", { class: "top", "data-of": who },
      make("caption", {}, `top ${PAGE.top} of the ${who}`),
      make("tr", {}, make("th"), make("th", {}, "teacher p"), make("th", {}, "student q")));
    for (const each of found[who]) {
      const name = make("td", { title: `token ${each.id}` }, tokenName(each.id));
      const bars = [bar("teacher", each.teacher), bar("student", each.student)];
      table.append(make("tr", { class: each.id === sampled ? "sampled" : "" }, name, ...bars));
    }
    if (!found[who].length) table.append(row("unknown", "", ""));
    return table;
  });
}

function bar(who, logprob) {
  const probability = Math.exp(logprob);
  if (Number.isNaN(probability)) return make("td", { class: "bar" }, "unknown");
  const filled = make("span", { class: who });
  filled.style.width = `${Math.min(probability, 1) * 100}%`;
  const percent = probability * 100;
  const text = percent >= 0.05 || percent === 0 ? `${percent.toFixed(1)} %` : "< 0.1 %";
  return make("td", { class: "bar" }, filled, make("em", {}, text));
}

function whyNone(response, token) {
  const { threshold, top_tokens } = PAGE.sides[response.side].about;
  const entropy = COLUMNS.teacher_entropy[token];
  const isTame = entropy < threshold && COLUMNS.reverse_kl[token] < PAGE.notable_kl;
  if (top_tokens === "notable" && threshold !== null && isTame) {
    const told = figure("teacher_entropy", entropy);
    return `No alternatives kept here: H = ${told} is below τ = ${threshold} nats, and reverse KL below ${PAGE.notable_kl}.`;
  }
  if (PAGE.alternatives_kept < PAGE.summary.num_alternatives) {
    const kept = PAGE.alternatives_kept.toLocaleString("en");
    return `No alternatives on this page: it has those of the ${kept} tokens of the highest teacher entropy.`;
  }
  return "No alternatives were recorded here.";
}
