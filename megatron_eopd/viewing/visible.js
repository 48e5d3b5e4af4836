// Bytes of tokens into parts of text in which everything can be seen; visible.py has the same rules.
// A part is [kind, text], its kind text, mark, newline, hex or special.

const HIDDEN = /[\p{C}\p{Zl}\p{Zp}\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0]|(?! )\p{Zs}/u;
const UTF8 = new TextDecoder("utf-8", { ignoreBOM: true });  // that mark is a character like others

function hex(bytes) {
  return `⟨${Array.from(bytes, (b) => b.toString(16).padStart(2, "0").toUpperCase()).join(" ")}⟩`;
}

function markOf(char) {
  const code = char.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return code === 0x7f ? "␡" : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
}

function pushHex(parts, bytes) {
  const last = parts.at(-1);
  if (last?.[0] === "hex") last[1] = `${last[1].slice(0, -1)} ${hex(bytes).slice(1)}`;
  else parts.push(["hex", hex(bytes)]);
}

function pushText(parts, text) {
  for (const char of text) {
    if (char === "\n") parts.push(["newline", "↵"]);
    else if (char === "\t") parts.push(["mark", "⇥"]);
    else if (HIDDEN.test(char)) parts.push(["mark", markOf(char)]);
    else if (parts.length && parts.at(-1)[0] === "text") parts.at(-1)[1] += char;
    else parts.push(["text", char]);
  }
}

function partsOfText(text) {
  const parts = [];
  pushText(parts, text);
  return parts;
}

// Bytes of the character that one begins; 0 of one that begins none.
function lengthBy(first) {
  if (first < 0x80) return 1;
  if (first < 0xc2 || first > 0xf4) return 0;
  return first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

// Whether UTF-8 lets this byte follow: no overlong forms, no surrogates, no end beyond 10FFFF.
function goesOn(begin, byte) {
  let low = 0x80, high = 0xbf;
  if (begin.length === 1) {
    low = { 0xe0: 0xa0, 0xf0: 0x90 }[begin[0]] ?? low;
    high = { 0xed: 0x9f, 0xf4: 0x8f }[begin[0]] ?? high;
  }
  return low <= byte && byte <= high;
}

// A function from one piece after the other to {parts, text}; text: the characters that it completes.
// A character that several tokens share is shown at the one that completes it.
function makeReader() {
  let open = [];  // the begin of a character, of this token and of those before it
  return function read(piece) {
    if (piece.special || !open.length) {
      open = [];
      if (piece.alone) return piece.alone;  // most tokens are whole characters
    }
    const isFirst = !open.length;
    const seen = piece.special ? readSpecial(piece) : readBytes(piece.bytes, open);
    open = seen.open;
    if (isFirst && !open.length) piece.alone = seen;
    return seen;
  };
}

function readSpecial(piece) {
  const name = partsOfText(UTF8.decode(piece.bytes)).map((part) => part[1]).join("");
  const isTag = name.startsWith("<") && name.endsWith(">");
  return { parts: [["special", `⟨${isTag ? name.slice(1, -1) : name}⟩`]], text: name, open: [] };
}

function readBytes(bytes, before) {
  const parts = [];
  let open = [...before], text = "", own = 0;  // own: how many of the open bytes are this token's
  const close = () => { open = []; own = 0; };
  for (const byte of bytes) {
    if (open.length && !goesOn(open, byte)) {
      if (own) pushHex(parts, open.slice(-own));
      close();
    }
    if (!open.length && lengthBy(byte) === 0) {
      pushHex(parts, [byte]);
      continue;
    }
    open.push(byte);
    own++;
    if (open.length === lengthBy(open[0])) {
      const char = UTF8.decode(Uint8Array.from(open));
      text += char;
      pushText(parts, char);
      close();
    }
  }
  if (own) pushHex(parts, open.slice(-own));
  return { parts, text, open };
}

const NO_PIECE = { bytes: new Uint8Array(0), special: false };

function partsOfId(id) {
  const { parts } = makeReader()(PIECES.get(id) ?? NO_PIECE);
  return parts.length ? parts : [["mark", "(empty)"]];
}

// Model text enters the page here alone, as text nodes; `breaks`: whether lines end where they end.
function addParts(element, parts, breaks = false) {
  const isBlank = parts.every(([kind, text]) => kind === "text" && text.trim() === "");
  for (const [kind, text] of parts) {
    if (kind === "text") element.append(isBlank ? text.replaceAll(" ", "·") : text);
    else element.append(make("i", { class: kind }, text), kind === "newline" && breaks ? "\n" : "");
  }
  return element;
}

// An element; attributes by name, functions as listeners, and children as nodes or text.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
