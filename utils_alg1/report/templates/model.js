"use strict";
// The exported model in a worker: the forward pass of model.py, one character at a time, and the loop of
// utils_alg1/network/sampling.py. Weights are float32 here; sums are computed in double precision.
//
// Shapes use the letters of model.py: T time (characters read), C = n_embd, H = n_head, S = C / H, V = vocab_size.
// Matrices (N, C) are flat arrays, row after row.

const LAYER_NORM_EPS = 1e-5; // the default of torch.nn.LayerNorm
const RMS_NORM_EPS = 2 ** -23; // that of torch.nn.functional.rms_norm in float32
const TURN = 30; // milliseconds between two looks at what the page has sent

/** Returns the bytes of a base64. */
function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes.buffer;
}

/** Returns the weights by the names of model.py: 16-bit integers, times a scale for each row of a matrix. */
function unpack({ shapes, integers, scales }) {
  const integerOf = new Int16Array(bytesOf(integers)); // of all tensors, one after another
  const scaleOf = new Float32Array(bytesOf(scales));
  const weights = {};
  let [place, row] = [0, 0];
  for (const [name, shape] of shapes) {
    const width = shape.at(-1);
    const tensor = (weights[name] = new Float32Array(shape.reduce((a, b) => a * b)));
    for (let start = 0; start < tensor.length; start += width, row++) {
      for (let i = start; i < start + width; i++) tensor[i] = integerOf[place++] * scaleOf[row];
    }
  }
  return weights;
}

/** Computes matrix (N, C) x (C) + bias (N), or without a bias, into `out` (N). */
function linear(matrix, bias, x, out) {
  for (let n = 0, i = 0; n < out.length; n++) {
    let sum = bias ? bias[n] : 0;
    for (let c = 0; c < x.length; c++, i++) sum += matrix[i] * x[c];
    out[n] = sum;
  }
}

/** Computes a layer norm of x (C) into `out` (C). */
function layerNorm(x, weight, bias, out) {
  const mean = x.reduce((a, b) => a + b, 0) / x.length;
  const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
  const scale = 1 / Math.sqrt(variance + LAYER_NORM_EPS);
  for (let c = 0; c < x.length; c++) out[c] = (x[c] - mean) * scale * weight[c] + bias[c];
}

/** Turns scores (N) into probabilities in place. */
function softmax(scores) {
  const largest = scores.reduce((a, b) => Math.max(a, b));
  let sum = 0;
  for (let i = 0; i < scores.length; i++) sum += scores[i] = Math.exp(scores[i] - largest);
  for (let i = 0; i < scores.length; i++) scores[i] /= sum;
}

/** Reads a text character by character, and keeps the keys and values of what it has read. */
class Reader {
  constructor({ config, weights }) {
    const { n_embd: C, n_head: H, n_layer, block_size, vocab_size: V } = config;
    this.config = config;
    this.weights = weights;
    this.length = 0; // characters read; set to 0, they are forgotten
    this.attention = new Float32Array(n_layer * H * block_size); // of the newest character: (n_layer, H, T)
    this.keys = Array.from({ length: n_layer }, () => new Float32Array(block_size * C)); // (T, C) of a layer
    this.values = Array.from({ length: n_layer }, () => new Float32Array(block_size * C));
    this.logits = new Float32Array(V);
    [this.x, this.normed, this.mixed, this.delta] = Array.from({ length: 4 }, () => new Float32Array(C));
    this.qkv = new Float32Array(3 * C);
    this.hidden = new Float32Array(4 * C);
  }

  /** Reads the next token; returns the logits (V) of what follows it, which the next call overwrites. */
  read(token) {
    const { weights, x, normed, delta, hidden } = this;
    const C = x.length;
    const positions = weights["position_embedding_table.weight"]; // none with rotary positions
    for (let c = 0; c < C; c++) {
      x[c] = weights["token_embedding_table.weight"][token * C + c] + (positions ? positions[this.length * C + c] : 0);
    }
    for (let layer = 0; layer < this.config.n_layer; layer++) {
      const of = name => weights[`blocks.${layer}.${name}`];
      layerNorm(x, of("ln1.weight"), of("ln1.bias"), normed);
      linear(of("sa.qkv.weight"), null, normed, this.qkv);
      this.attend(layer);
      linear(of("sa.proj.weight"), of("sa.proj.bias"), this.mixed, delta);
      for (let c = 0; c < C; c++) x[c] += delta[c];
      layerNorm(x, of("ln2.weight"), of("ln2.bias"), normed);
      linear(of("ffwd.net.0.weight"), of("ffwd.net.0.bias"), normed, hidden);
      for (let i = 0; i < hidden.length; i++) hidden[i] = Math.max(hidden[i], 0); // ReLU
      linear(of("ffwd.net.2.weight"), of("ffwd.net.2.bias"), hidden, delta);
      for (let c = 0; c < C; c++) x[c] += delta[c];
    }
    this.length++;
    layerNorm(x, weights["ln_f.weight"], weights["ln_f.bias"], normed);
    linear(weights["lm_head.weight"], weights["lm_head.bias"], normed, this.logits);
    return this.logits;
  }

  /** Computes the attention of a layer from `qkv` into `mixed` (C), and adds the keys and values to those kept. */
  attend(layer) {
    const { n_embd: C, n_head: H, block_size } = this.config;
    const S = C / H;
    const [keys, values, mixed] = [this.keys[layer], this.values[layer], this.mixed];
    for (let start = 0; start < 2 * C; start += S) this.normAndRotate(this.qkv.subarray(start, start + S));
    keys.set(this.qkv.subarray(C, 2 * C), this.length * C);
    values.set(this.qkv.subarray(2 * C), this.length * C);
    mixed.fill(0);
    for (let head = 0; head < H; head++) {
      const query = this.qkv.subarray(head * S, (head + 1) * S);
      const first = (layer * H + head) * block_size;
      const weights = this.attention.subarray(first, first + this.length + 1); // (T)
      for (let t = 0; t < weights.length; t++) {
        let score = 0;
        for (let s = 0, k = t * C + head * S; s < S; s++, k++) score += query[s] * keys[k];
        weights[t] = score / Math.sqrt(S);
      }
      softmax(weights);
      for (let t = 0; t < weights.length; t++) {
        for (let s = head * S; s < (head + 1) * S; s++) mixed[s] += weights[t] * values[t * C + s];
      }
    }
  }

  /** Applies QK-norm and rotary positions, each if the model has it, to a query or key (S) of the next character. */
  normAndRotate(x) {
    const { positions, qk_norm, block_size } = this.config;
    const S = x.length;
    if (qk_norm) {
      const square = x.reduce((sum, value) => sum + value * value, 0) / S;
      const scale = 1 / Math.sqrt(square + RMS_NORM_EPS);
      for (let s = 0; s < S; s++) x[s] *= scale;
    }
    if (positions !== "rotary") return;
    for (let i = 0; i < S / 2; i++) {
      const angle = this.length * block_size ** ((-2 * i) / S);
      const [cos, sin, a, b] = [Math.cos(angle), Math.sin(angle), x[i], x[i + S / 2]];
      x[i] = a * cos - b * sin;
      x[i + S / 2] = a * sin + b * cos;
    }
  }
}

/** Returns a function that draws numbers in [0, 1) from a seed (mulberry32). */
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Chooses a token from logits (V): with temperature 0 the likeliest, else one of the `topK` likeliest at random. */
function choose(logits, temperature, topK, random) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  if (!Number.isFinite(largest)) throw new Error("the model's logits are not finite");
  if (temperature === 0) return logits.indexOf(largest);
  const least = topK < logits.length ? logits.slice().sort().at(-topK) : -Infinity;
  let sum = 0;
  const sums = Array.from(logits, z => (z < least ? sum : (sum += Math.exp((z - largest) / temperature))));
  const point = random() * sum;
  return sums.findIndex(value => value > point);
}

let model; // { config, weights }
let job = 0; // the text that is being drawn; 0: none

/** Lets the worker receive what the page has sent. */
const nextTurn = () => new Promise(resolve => setTimeout(resolve));

/**
 * Continues tokens, and sends what it draws to the page. The model sees the whole text while it fits into block_size;
 * when the context is full, its older half is dropped and the rest is read again, as in `generate_tokens`.
 */
async function generate({ tokens, length, temperature, topK, seed }, ownJob) {
  const { block_size } = model.config;
  const reader = new Reader(model);
  const random = randomNumbers(seed);
  let context = tokens;
  let unread = tokens;
  let drawn = [];
  let turnEnds = performance.now() + TURN;
  for (let left = length; left > 0; left--) {
    let logits;
    for (const token of unread) {
      logits = reader.read(token);
      if (performance.now() < turnEnds) continue;
      postMessage({ kind: "drawn", job: ownJob, tokens: drawn });
      drawn = [];
      await nextTurn();
      if (job !== ownJob) return;
      turnEnds = performance.now() + TURN;
    }
    const token = choose(logits, temperature, topK, random);
    drawn.push(token);
    unread = [token];
    context = [...context, token].slice(-block_size - 1);
    if (reader.length === block_size) {
      context = context.slice(-Math.max(1, block_size >> 1));
      unread = context;
      reader.length = 0;
    }
  }
  postMessage({ kind: "drawn", job: ownJob, tokens: drawn, done: true });
}

/** Returns the probabilities (V) of what follows tokens (T), and the attention weights (T, T) of a head over them. */
function look({ tokens, layer, head }) {
  const { n_head, block_size } = model.config;
  const T = tokens.length;
  const reader = new Reader(model);
  const attention = new Float32Array(T * T);
  const first = (layer * n_head + head) * block_size;
  tokens.forEach((token, t) => {
    reader.read(token);
    attention.set(reader.attention.subarray(first, first + t + 1), t * T);
  });
  softmax(reader.logits);
  return { kind: "seen", probabilities: reader.logits, attention };
}

onmessage = ({ data }) => {
  if (data.kind === "load") model = { config: data.config, weights: unpack(data) };
  if (data.kind === "look") postMessage(look(data));
  if (data.kind === "stop") job = 0;
  if (data.kind === "generate") {
    job = data.job;
    generate(data, job).catch(error => postMessage({ kind: "failed", job: data.job, message: error.message }));
  }
};
