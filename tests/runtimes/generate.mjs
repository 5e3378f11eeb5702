// node generate.mjs NODE_MODULES REQUEST.json: greedy tokens of artifacts in transformers.js, as JSON on standard output.
// REQUEST: {models: [{folder, name, ids | messages}], tokens}. Nothing is fetched; the artifact says what to load.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [modules, requestFile] = process.argv.slice(2);
const { env, AutoTokenizer, AutoModelForCausalLM, Tensor } = createRequire(`${modules}/`)("@huggingface/transformers");
const request = JSON.parse(readFileSync(requestFile, "utf8"));
env.allowRemoteModels = false;

const answers = [];
for (const asked of request.models) {
  env.localModelPath = asked.folder;
  const model = await AutoModelForCausalLM.from_pretrained(asked.name);
  let inputs, text = null, tokenizer = null;
  if (asked.messages) {
    tokenizer = await AutoTokenizer.from_pretrained(asked.name);
    inputs = tokenizer.apply_chat_template(asked.messages, { add_generation_prompt: true, return_dict: true });
  } else {
    const ids = BigInt64Array.from(asked.ids.map(BigInt));
    inputs = {
      input_ids: new Tensor("int64", ids, [1, ids.length]),
      attention_mask: new Tensor("int64", ids.map(() => 1n), [1, ids.length]),
    };
  }
  const prompt = Array.from(inputs.input_ids.data, Number);
  const made = await model.generate({ ...inputs, max_new_tokens: request.tokens, do_sample: false });
  const tokens = Array.from(made.data, Number).slice(prompt.length);
  if (tokenizer) text = tokenizer.decode(tokens, { skip_special_tokens: true });
  answers.push({ prompt, tokens, text });
}
console.log(JSON.stringify(answers));
