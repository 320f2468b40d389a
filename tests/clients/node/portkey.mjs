import { Portkey } from "portkey-ai";

import { baseURL, key, run } from "./lifecycle.mjs";

const portkey = new Portkey({ apiKey: key, provider: "@replicate", baseURL });

await run(
  {
    create: (body) => portkey.post("/predictions", body),
    read: (id) => portkey.get(`/predictions/${id}`),
    cancel: (id) => portkey.post(`/predictions/${id}/cancel`),
  },
  (error) => ({
    status: error.status,
    code: error.error?.error?.code,
    request_id: error.headers?.["x-request-id"],
  }),
);
