// The page's data: columns of numbers, decoded as columns.py has encoded them.

const DATA_BLOCK = document.getElementById("data");
const PAGE = JSON.parse(DATA_BLOCK.textContent);
const SIGNALS = Object.keys(PAGE.signals);
const COLUMNS = {};  // name → Int32Array (−1: none) or, of values in steps, Float32Array (NaN: unknown)
const PIECES = new Map();  // id → {bytes, special}
const FARTHEST = 2 ** 30;  // steps from zero, as in columns.py: from there on a value is infinite
const THRESHOLD = PAGE.sides[0].about.threshold;  // null: no number

async function inflated(base64) {
  const text = atob(base64);
  const packed = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n++) packed[n] = text.charCodeAt(n);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function decode({ step, planes, data }) {
  const bytes = await inflated(data);
  const count = bytes.length / planes;
  const isWhole = step === 1;
  const values = isWhole ? new Int32Array(count) : new Float32Array(count);
  for (let n = 0; n < count; n++) {
    let code = bytes[n];
    for (let p = 1; p < planes; p++) code += bytes[p * count + n] * 256 ** p;
    if (code === 0) values[n] = isWhole ? -1 : NaN;
    else values[n] = valueOf(code % 2 ? (code - 1) / 2 : -code / 2, step);
  }
  return values;
}

function valueOf(steps, step) {
  return step !== 1 && Math.abs(steps) >= FARTHEST ? Math.sign(steps) * Infinity : steps * step;
}

async function readColumns() {
  const decoded = Object.entries(PAGE.columns).map(async ([name, column]) => {
    COLUMNS[name] = await decode(column);
    column.data = null;
  });
  await Promise.all(decoded);
  let begin = 0;
  COLUMNS.piece_ids.forEach((id, n) => {
    const end = begin + COLUMNS.piece_lengths[n];
    const bytes = Uint8Array.from(COLUMNS.piece_bytes.subarray(begin, end));
    PIECES.set(id, { bytes, special: COLUMNS.piece_special[n] === 1 });
    begin = end;
  });
  const rows = COLUMNS.top_rows;  // differences → rows
  for (let n = 1; n < rows.length; n++) rows[n] += rows[n - 1];
}

// Which row of the alternatives is that of a token; −1: it has none.
function alternativesRow(token) {
  const rows = COLUMNS.top_rows;
  let low = 0, high = rows.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rows[middle] < token) low = middle + 1;
    else high = middle;
  }
  return rows[low] === token ? low : -1;
}

// {teacher, student}: the most probable tokens of each model, as {id, student, teacher} with
// log-probabilities. The student's are put together from both lists: its own leaves out what the
// teacher's has. null where none are kept.
function alternativesOf(token) {
  const row = alternativesRow(token);
  if (row < 0) return null;
  const count = COLUMNS.top_rows.length;
  const all = [];
  for (let k = 0; k < 2 * PAGE.top; k++) {
    const at = k * count + row;
    const id = COLUMNS.top_ids[at];
    if (id < 0) continue;
    all.push({
      id,
      isTeachers: k < PAGE.top,
      student: COLUMNS.top_student_logprobs[at],
      teacher: COLUMNS.top_teacher_logprobs[at],
    });
  }
  const known = all.filter((each) => !Number.isNaN(each.student));
  return {
    teacher: all.filter((each) => each.isTeachers),
    student: known.sort((a, b) => b.student - a.student || 0).slice(0, PAGE.top),  // −∞ − −∞ is NaN
  };
}

// Each response, with where its tokens are, and its siblings: the responses to the same prompt.
function makeResponses() {
  let start = 0;
  const side1 = PAGE.sides[0].num_responses;
  const responses = PAGE.responses.map((told, n) => {
    const response = { ...told, n, start, side: n < side1 ? 0 : 1, means: {} };
    start += told.length;
    for (const name of SIGNALS) {
      response.means[name] = meanOf(COLUMNS[name].subarray(response.start, start));
    }
    response.isTruncated = told.finish_reason === "length";
    response.isReference = told.source === "reference";
    response.isWrong = told.verdict !== "" && told.verdict !== "right";
    return response;
  });
  return responses;
}

// {mean, infinite}: over the finite values, NaN of none; and how many are infinite, which would hide
// the others in a mean.
function meanOf(values) {
  let sum = 0, count = 0, infinite = 0;
  for (const value of values) {
    if (Number.isFinite(value)) { sum += value; count++; }
    else if (!Number.isNaN(value)) infinite++;
  }
  return { mean: count ? sum / count : NaN, infinite };
}

function idsOf(response) {
  return COLUMNS.ids.subarray(response.start, response.start + response.length);
}

function commonLength(a, b) {
  const end = Math.min(a.length, b.length);
  let n = 0;
  while (n < end && a[n] === b[n]) n++;
  return n;
}

// {sibling, length}: the one of `others` whose first tokens are the same for longest; null of none.
function nearest(response, others) {
  let best = null;
  for (const sibling of others) {
    if (sibling === response) continue;
    const length = commonLength(idsOf(response), idsOf(sibling));
    if (best === null || length > best.length) best = { sibling, length };
  }
  return best;
}
