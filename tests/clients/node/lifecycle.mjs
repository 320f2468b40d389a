// Creates a prediction and reads it to its end, creates a slow one and cancels it, prints what came back as one line.
// Usage: node <sdk>.mjs <base url, with /v1> <key> <version> <slow version>

import { setTimeout as sleep } from "node:timers/promises";

const INPUT = { text: "Ada" };
const POLLS = 100;
const ENDED = ["succeeded", "failed", "canceled", "aborted"];

export const [baseURL, key, version, slowVersion] = process.argv.slice(2);

async function walk({ create, read, cancel }) {
  const created = await create({ version, input: INPUT });
  let seen = await read(created.id);
  for (let polls = 1; polls < POLLS && !ENDED.includes(seen.status); polls += 1) {
    await sleep(50);
    seen = await read(created.id);
  }
  const slow = await create({ version: slowVersion, input: INPUT });
  return { created, read: seen, canceled: await cancel(slow.id) };
}

export async function run(calls, explain) {
  let line;
  try {
    line = await walk(calls);
  } catch (error) {
    line = { error: { class: error.constructor.name, message: error.message, ...explain(error) } };
  }
  console.log(JSON.stringify(line));
}
