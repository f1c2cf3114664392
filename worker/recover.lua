-- Takes back the jobs of one queue whose lease has run out: to the tail of the queue while retries are left, else
-- to the failed ones. Executions of stock RQ workers are left to RQ's own clean-up, which runs their callbacks.
--
-- KEYS[1]  the queue's started registry
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the queue's name
-- ARGV[3]  now, as RQ writes a time
-- ARGV[4]  seconds to keep a failure where the job doesn't say
-- ARGV[5]  base64 of the compressed reason
-- ARGV[6]  what our execution ids begin with
-- ARGV[7]  at most so many in one call
--
-- Returns {number queued again, ids of the failed jobs...}.

local prefix, queue, now = ARGV[1], ARGV[2], ARGV[3]
local replies = {0}
for _, pair in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', clock(), 'LIMIT', 0, ARGV[7])) do
  local id, execution = string.match(pair, '^([^:]*):(.*)$')
  if id and string.sub(execution, 1, #ARGV[6]) == ARGV[6] then
    local key = prefix .. ':job:' .. id
    local worker = redis.call('HGET', prefix .. ':execution:' .. pair, 'worker_name') or ''
    local fields = redis.call('HMGET', key, 'status', 'retries_left', 'failure_ttl')
    local retries = tonumber(fields[2] or '') or 0
    if fields[1] == 'started' and retries > 0 then
      redis.call('HSET', key, 'retries_left', retries - 1)
      put_back(prefix, queue, id, 'RPUSH')
      replies[1] = replies[1] + 1
    elseif fields[1] == 'started' then
      local ttl = tonumber(fields[3] or '') or tonumber(ARGV[4])
      close_job(prefix, queue, id, 'failed', ttl, now, {'type', 2, 'worker_name', worker, 'exc_string', ARGV[5]})
      replies[#replies + 1] = id
    end
    end_execution(prefix, queue, id, execution, worker)
  end
end
return replies
