// The playground: what is typed goes to the model, which runs in a worker so that the page stays alive (model.js).

/** Returns the elements of the playground by their ids, without the prefix "play-". */
function playgroundElements() {
  const found = document.querySelectorAll("[id^='play-']");
  return Object.fromEntries([...found].map(element => [element.id.slice("play-".length), element]));
}

/**
 * Returns a text as tokens: those of its characters that the model knows, and the others. It may be known in another
 * Unicode normal form only.
 */
function encode(text, tokenOf) {
  const unknownIn = form => [...form].filter(c => !tokenOf.has(c));
  const forms = [text, text.normalize("NFC"), text.normalize("NFD")];
  const best = forms.reduce((a, b) => (unknownIn(b).length < unknownIn(a).length ? b : a));
  const known = [...best].filter(c => tokenOf.has(c));
  return { tokens: known.map(c => tokenOf.get(c)), unknown: [...new Set(unknownIn(best))] };
}

/** Shows the likeliest characters and their probabilities (V) as bars. */
function showProbabilities(list, vocabulary, probabilities) {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  list.replaceChildren();
  for (const token of order.slice(0, 10)) {
    const row = add(list, "li");
    add(row, "code", {}, label(vocabulary[token]));
    add(row, "span", { class: "share" }, percent(probabilities[token]));
    add(add(row, "span", { class: "bar" }), "span").style.width = `${100 * probabilities[token]}%`;
  }
}

/**
 * Returns the number in an input, within its limits and whole if its steps are; without a number its default, which may
 * be undefined. The input shows what is returned.
 */
function numberIn(input) {
  const typed = Number.isNaN(input.valueAsNumber) ? input.defaultValue : input.value;
  const limited = Math.min(Math.max(Number(typed), Number(input.min)), input.max === "" ? Infinity : Number(input.max));
  const number = input.step === "1" ? Math.round(limited) : limited;
  input.value = typed === "" ? "" : number;
  return typed === "" ? undefined : number;
}

function startPlayground({ config, vocabulary, default_prompt: defaultPrompt, ...rest }) {
  const page = playgroundElements();
  const tokenOf = new Map(vocabulary.map((c, token) => [c, token]));
  const source = document.getElementById("model").textContent;
  const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  let looking = false; // the worker computes what the page shows of the typed text
  let outdated = false; // and something else has been typed or chosen since
  let job = 0; // the text that is being drawn: each has a number
  let text; // its element
  let held = ""; // a CR at its end, which may be the first half of a line end
  const decode = tokens => tokens.map(token => vocabulary[token]).join("");
  let asked = []; // the tokens (T) of the newest question
  let seen = { tokens: [], attention: [] }; // those of the newest answer, and its attention weights (T, T)

  /** Returns the typed text as the model reads it: its last block_size characters, or the default prompt. */
  function typed() {
    const { tokens, unknown } = encode(page.prompt.value, tokenOf);
    const names = unknown.map(label).join(" ");
    page.unknown.textContent = unknown.length ? `left out, as the model does not know them: ${names}` : "";
    return tokens.length ? tokens.slice(-config.block_size) : [tokenOf.get(defaultPrompt)];
  }

  /** Asks the worker about the typed text; one question at a time, the newest last. */
  function look() {
    outdated = looking;
    if (looking) return;
    looking = true;
    asked = typed();
    worker.postMessage({ kind: "look", tokens: asked, layer: page.layer.selectedIndex, head: page.head.selectedIndex });
  }

  /** Returns the attention weights (index + 1) of the character at an index: none looks ahead. */
  function weightsOf(index) {
    const start = index * seen.tokens.length;
    return seen.attention.slice(start, start + index + 1);
  }

  function describe(index) {
    const weights = weightsOf(index);
    const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 3);
    const shares = order.map(i => `${label(vocabulary[seen.tokens[i]])} ${percent(weights[i])}`);
    return `${label(vocabulary[seen.tokens[index]])} looks at: ${shares.join(", ")}`;
  }
  const attention = addCharacters(page.attention, "train", "typed text by attention", describe, index => {
    const weights = weightsOf(index);
    const largest = Math.max(...weights);
    attention.colour(weights.map(weight => Math.sqrt(weight / largest)));
  });

  function setDrawing(isDrawing) {
    page.start.disabled = isDrawing;
    page.stop.disabled = !isDrawing;
  }

  function start() {
    const { tokens } = encode(page.prompt.value, tokenOf);
    page.text.replaceChildren();
    page.status.textContent = "";
    text = add(page.text, "pre", { dir: "auto", "aria-label": "your text and its continuation" });
    add(text, "b", {}, visible(decode(tokens)));
    text.scrollTop = text.scrollHeight;
    held = "";
    job++;
    setDrawing(true);
    worker.postMessage({
      ...{ kind: "generate", job, tokens: typed() },
      length: numberIn(page.length),
      temperature: numberIn(page.temperature),
      topK: numberIn(page["top-k"]) ?? vocabulary.length,
      seed: numberIn(page.seed),
    });
  }

  function stop() {
    job++;
    worker.postMessage({ kind: "stop" });
    setDrawing(false);
  }

  worker.onmessage = ({ data }) => {
    if (data.kind === "drawn" && data.job === job) {
      const drawn = held + decode(data.tokens);
      held = drawn.endsWith("\r") && !data.done ? "\r" : "";
      const atEnd = text.scrollTop + text.clientHeight > text.scrollHeight - 4; // else it is being read above
      text.append(visible(drawn.slice(0, drawn.length - held.length)));
      if (atEnd) text.scrollTop = text.scrollHeight;
      if (data.done) setDrawing(false);
    }
    if (data.kind === "failed" && data.job === job) {
      setDrawing(false);
      page.status.textContent = data.message;
    }
    if (data.kind === "seen") {
      looking = false;
      seen = { tokens: asked, attention: data.attention };
      const characters = asked.map(token => vocabulary[token]);
      showProbabilities(page.probabilities, vocabulary, data.probabilities);
      attention.show(characters, [], characters.length - 1);
      if (outdated) look();
    }
  };
  worker.onerror = event => (page.status.textContent = `the model cannot run in this browser: ${event.message}`);

  for (const [select, count] of [[page.layer, config.n_layer], [page.head, config.n_head]]) {
    for (let i = 0; i < count; i++) add(select, "option", {}, String(i));
    select.addEventListener("change", look);
  }
  page.prompt.addEventListener("input", look);
  page.start.addEventListener("click", start);
  page.stop.addEventListener("click", stop);
  setDrawing(false);
  worker.postMessage({ kind: "load", config, ...rest });
  look();
}

startPlayground(JSON.parse(document.getElementById("playground").textContent));
