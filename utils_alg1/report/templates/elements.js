"use strict";
// What the scripts of the pages share: adding elements, and characters that are coloured and can be chosen.

/** Adds an element to `parent` and returns it; inside an <svg> it is an SVG element. */
function add(parent, name, attributes = {}, text = "") {
  const isSvg = name === "svg" || parent instanceof SVGElement;
  const element = document.createElementNS(`http://www.w3.org/${isSvg ? "2000/svg" : "1999/xhtml"}`, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return parent.appendChild(element);
}

/** Returns a probability as a percentage. */
function percent(probability) {
  if (probability < 0.0005) return "< 0.1 %";
  return `${(100 * probability).toFixed(probability < 0.0995 ? 1 : 0)} %`;
}

/** Returns a text whose control characters are visible; line feeds and tabs stay, and CR LF is a line feed. */
function visible(text) {
  const symbol = c => (c === "\x7f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0)));
  return text.replaceAll("\r\n", "\n").replace(/[\0-\x08\x0b-\x1f\x7f]/g, symbol);
}

/** Returns a character as it is named in a list: one that leaves no mark as a symbol or by its number. */
function label(character) {
  const symbol = { " ": "␣", "\n": "↵", "\t": "⇥" }[character] ?? visible(character);
  if (!/[\p{C}\p{Z}\p{M}]/u.test(symbol)) return symbol;
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/**
 * Adds a text of coloured characters to `parent`. One can be chosen: by pointer, or by the arrow keys; a line below
 * tells what `describe(index)` says of it.
 *
 * Returns { show(characters, shares, chosen) }, with shares (0 to 1) of the colour of class `kind`.
 */
function addCharacters(parent, kind, name, describe, choose = () => {}) {
  const text = add(parent, "pre", { class: `characters ${kind}`, tabindex: 0, role: "group", "aria-label": name });
  const output = add(parent, "output");
  let chosen = -1;

  function pick(index) {
    if (index === chosen || !text.children[index]) return;
    text.children[chosen]?.classList.remove("chosen");
    text.children[index].classList.add("chosen");
    chosen = index;
    choose(index);
    output.textContent = describe(index);
  }
  text.addEventListener("pointerover", event => pick([...text.children].indexOf(event.target)));
  text.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) pick(Math.max(0, chosen + step));
    if (step) event.preventDefault();
  });

  function colour(shares) {
    [...text.children].forEach((span, i) => span.style.setProperty("--share", `${55 * (shares[i] ?? 0)}%`));
  }
  function show(characters, shares, index = -1) {
    text.replaceChildren();
    output.textContent = "";
    chosen = -1;
    for (const c of characters) add(text, "span", {}, c === "\n" ? "↵\n" : visible(c));
    colour(shares);
    pick(index);
  }
  return { show, colour };
}
