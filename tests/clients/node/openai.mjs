import OpenAI from "openai";
import { createHeaders } from "portkey-ai";

import { baseURL, key, run } from "./lifecycle.mjs";

const client = new OpenAI({
  apiKey: "not-used",
  baseURL,
  defaultHeaders: createHeaders({ provider: "@replicate", apiKey: key }),
});

await run(
  {
    create: (body) => client.post("/predictions", { body }),
    read: (id) => client.get(`/predictions/${id}`),
    cancel: (id) => client.post(`/predictions/${id}/cancel`),
  },
  (error) => ({ status: error.status, code: error.code, request_id: error.requestID }),
);
