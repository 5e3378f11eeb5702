// node embed.mjs NODE_MODULES REQUEST.json: embeddings of texts in transformers.js, as JSON on standard output.
// REQUEST: {folder, name, texts}. Nothing is fetched; the artifact says what to load.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [modules, requestFile] = process.argv.slice(2);
const { env, pipeline } = createRequire(`${modules}/`)("@huggingface/transformers");
const { folder, name, texts } = JSON.parse(readFileSync(requestFile, "utf8"));
env.localModelPath = folder;
env.allowRemoteModels = false;
const embed = await pipeline("feature-extraction", name);
const made = [];
for (const text of texts) made.push((await embed(text, { pooling: "mean", normalize: true })).tolist()[0]);
console.log(JSON.stringify(made));
