-- Takes back the jobs of one queue whose lease has run out: another attempt while retries are left, else failed.
--
-- KEYS[1]  the queue's started registry
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the queue's name
-- ARGV[3]  now, as RQ writes a time
-- ARGV[4]  seconds to keep a failure where the job doesn't say
-- ARGV[5]  base64 of the compressed reason
-- ARGV[6]  at most so many in one call
--
-- Returns {number tried again, number failed, ids of those after which RQ has something to do...}.

local prefix, queue, now, limit = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[6])
local replies, left_alone, taken = {0, 0}, 0, 0

local function tell_sequel(id)
  note_sequel(prefix, queue, id)
  replies[#replies + 1] = id
end

local function recover(id, execution)
  local key = prefix .. ':job:' .. id
  local fields = redis.pcall('HMGET', key, 'status', 'failure_ttl')
  if fields.err then
    fields = {}
  end
  local worker = redis.call('HGET', prefix .. ':execution:' .. id .. ':' .. execution, 'worker_name') or ''
  if fields[1] == 'started' then
    local again = try_again(prefix, queue, id)
    if again then
      replies[1] = replies[1] + 1
      if again == 'scheduled' and has_rate_limit(prefix, id) then
        tell_sequel(id)
      end
    else
      local entry = {'type', 2, 'worker_name', worker, 'exc_string', ARGV[5]}
      close_job(prefix, queue, id, 'failed', seconds(fields[2], tonumber(ARGV[4])), now, entry)
      replies[2] = replies[2] + 1
      if has_sequel(prefix, id) then
        tell_sequel(id)
      end
    end
  end
  end_execution(prefix, queue, id, execution, worker)
end

local cutoff = clock()
while taken < limit do
  local pairs_here = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', cutoff, 'LIMIT', left_alone, 100)
  if #pairs_here == 0 then
    break
  end
  for _, pair in ipairs(pairs_here) do
    local id, execution = string.match(pair, '^([^:]*):(.*)$')
    if id then
      recover(id, execution)
      taken = taken + 1
    else
      left_alone = left_alone + 1
    end
  end
end
return replies
