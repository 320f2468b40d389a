import Replicate from "replicate";

import { baseURL, key, run } from "./lifecycle.mjs";

const replicate = new Replicate({ auth: key, baseUrl: baseURL });

await run(
  {
    create: (body) => replicate.predictions.create(body),
    read: (id) => replicate.predictions.get(id),
    cancel: (id) => replicate.predictions.cancel(id),
  },
  (error) => ({ status: error.response?.status, request_id: error.response?.headers.get("x-request-id") }),
);
