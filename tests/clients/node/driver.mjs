// The Node SDKs: reads one call per line, makes it as a user would write it, prints what came of it as one line.

import dns from "node:dns";
import { createInterface } from "node:readline";

import OpenAI from "openai";
import { Portkey, createHeaders } from "portkey-ai";
import Replicate from "replicate";

// Nothing here may reach beyond the loopback interface.
dns.lookup = (host, options, done) => done(new Error(`left the proxy for ${host}`));

const AsyncFunction = (async () => {}).constructor;

// The names that a call finds, bound to one proxy and one key.
const clients = (url, key) => ({
  portkey: new Portkey({ apiKey: key, provider: "@replicate", baseURL: url }),
  openai: new OpenAI({
    apiKey: "unused",
    baseURL: url,
    defaultHeaders: createHeaders({ provider: "@replicate", apiKey: key }),
  }),
  replicate: new Replicate({ auth: key, baseUrl: url }),
  OpenAI,
  Portkey,
  Replicate,
  createHeaders,
});

// Run the statements of a call; its value is that of the last one.
function evaluate(call, names) {
  const last = call.lastIndexOf("; ") + 1;
  const body = `${call.slice(0, last)} return (${call.slice(last)});`;
  return new AsyncFunction(...Object.keys(names), body)(...Object.values(names));
}

// As JSON; what JSON cannot say has a word for it.
function plain(value) {
  if (value instanceof Blob) return { $bytes: value.size };
  if (value instanceof Response) return { $response: value.status };
  if (Array.isArray(value)) return value.map(plain);
  return value;
}

for await (const line of createInterface({ input: process.stdin })) {
  const { call, url, key, names } = JSON.parse(line);
  let seen;
  try {
    seen = { value: plain(await evaluate(call, { ...clients(url, key), ...names })) ?? null };
  } catch (error) {
    const status = error.status ?? error.response?.status;
    const cause = error.cause?.message;
    seen = { error: error.constructor.name, status, message: cause ? `${error.message}: ${cause}` : error.message };
  }
  console.log(JSON.stringify(seen));
}
