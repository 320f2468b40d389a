-- POSTs for wrk: `-- BODY NAME VALUE NAME VALUE ...`; at the end one line with requests, microseconds and errors.
function init(arguments)
  wrk.method, wrk.body = "POST", arguments[1]
  for n = 2, #arguments, 2 do wrk.headers[arguments[n]] = arguments[n + 1] end
end

function done(summary, latency)
  local errors = summary.errors
  local lost = errors.connect + errors.read + errors.write + errors.timeout
  print(string.format("RESULT %d %d %d %d %.1f %.1f", summary.requests, summary.duration, errors.status, lost,
    latency:percentile(50), latency:percentile(99)))
end
