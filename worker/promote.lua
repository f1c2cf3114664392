-- Moves the jobs whose time has come from the scheduled registries onto their queues, for all queues of a worker, and
-- the parked ones whose wire version this worker reads. An RQ scheduler that does the same beside it does no harm: a job
-- that is not scheduled any more is only struck off.
--
-- KEYS[1]  the set of all queues
-- KEYS[2]  the set of all rate limits
-- KEYS[3+] the queues' scheduled registries
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  at most so many jobs in one call
-- ARGV[3]  the wire version up to which this worker reads
-- ARGV[4+] the queues' names, as many as registries
--
-- Returns {number moved, milliseconds until the next one is due or -1, number struck off, rate limits under which jobs
-- wait now...}.

local UNPARK_JOBS = 5000 -- taken up in one call, so that they keep their order
local STALE_LOOKS = 10 -- parked jobs of later versions that are looked at in one call, whether they still wait

local prefix, limit, version = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local now = clock()
local moved, struck_off, next_due = 0, 0, false
local rate_limits, is_listed = {}, {}

-- Waits for a slot, as RQ's Queue._enqueue_rate_limited_job has it, but since it was due: those of one second in order.
local function await_slot(key, id, due_at, rate_limit, concurrency)
  local limit_key = prefix .. ':rl:' .. rate_limit
  local reply = redis.pcall('HSET', limit_key, 'concurrency', concurrency)
  if type(reply) == 'table' and reply.err then
    return false -- a name that makes this the key of something else
  end
  clear_way('zset', limit_key .. ':rate_limited')
  clear_way('zset', limit_key .. ':allowed')
  redis.call('SADD', KEYS[2], rate_limit)
  redis.call('HSET', key, 'status', 'rate_limited')
  redis.call('ZADD', limit_key .. ':rate_limited', due_at, id)
  if not is_listed[rate_limit] then
    is_listed[rate_limit] = true
    rate_limits[#rate_limits + 1] = rate_limit
  end
  return true
end

local function promote(queue, id, due_at)
  local key = prefix .. ':job:' .. id
  local fields = redis.pcall('HMGET', key, 'status', 'enqueue_at_front', 'enqueue_at_front_on_retry', 'ended_at', 'ttl',
    'rate_limit_key', 'rate_limit_concurrency')
  if fields.err or fields[1] ~= 'scheduled' then
    struck_off = struck_off + 1
    return
  end
  local ttl = seconds(fields[5], 0)
  if ttl > 0 then
    redis.call('EXPIRE', key, ttl)
  end
  redis.call('HSET', key, 'origin', queue)
  moved = moved + 1
  local concurrency = seconds(fields[7], 0)
  if fields[6] and fields[6] ~= '' and concurrency > 0 then
    await_slot(key, id, due_at, fields[6], concurrency)
    return
  end
  local at_front = fields[2] == '1' or fields[3] == '1' and (fields[4] or '') ~= ''
  redis.call('HSET', key, 'status', 'queued', 'enqueued_at', timestamp())
  redis.call(at_front and 'LPUSH' or 'RPUSH', prefix .. ':queue:' .. queue, id)
  redis.call('SADD', KEYS[1], prefix .. ':queue:' .. queue)
end

-- Whether a parked job still waits there: it may have expired, or been canceled and put back.
local function is_parked(id)
  return redis.pcall('HGET', prefix .. ':job:' .. id, 'status') == 'queued'
end

-- Parked jobs back to the head of their queue, the oldest of one call first.
local function unpark(queue)
  local parked = prefix .. ':embedq:parked:' .. queue
  clear_way('zset', parked)
  if redis.call('EXISTS', parked) == 0 then
    return
  end
  local readable = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', parked, '-inf', version, 'LIMIT', 0, UNPARK_JOBS)) do
    if is_parked(id) then
      readable[#readable + 1] = {id, redis.call('HGET', prefix .. ':job:' .. id, 'enqueued_at') or ''}
      moved = moved + 1
    else
      struck_off = struck_off + 1
    end
    redis.call('ZREM', parked, id)
  end
  table.sort(readable, function(one, other) return one[2] > other[2] end)
  for _, job in ipairs(readable) do
    redis.call('LPUSH', prefix .. ':queue:' .. queue, job[1])
  end
  for _, id in ipairs(redis.call('ZRANDMEMBER', parked, STALE_LOOKS)) do
    if not is_parked(id) then
      redis.call('ZREM', parked, id)
    end
  end
end

clear_way('set', KEYS[1])
clear_way('set', KEYS[2])
for i = 3, #KEYS do
  clear_way('zset', KEYS[i])
  clear_way('list', prefix .. ':queue:' .. ARGV[i + 1])
  unpark(ARGV[i + 1])
  local left = limit - moved - struck_off
  local due = left > 0 and redis.call('ZRANGEBYSCORE', KEYS[i], '-inf', now, 'WITHSCORES', 'LIMIT', 0, left) or {}
  for j = 1, #due, 2 do
    promote(ARGV[i + 1], due[j], due[j + 1])
    redis.call('ZREM', KEYS[i], due[j])
  end
  local head = redis.call('ZRANGE', KEYS[i], 0, 0, 'WITHSCORES')
  if #head > 0 then
    next_due = math.min(next_due or math.huge, tonumber(head[2]))
  end
end

-- No number that Lua would print with an exponent, and none for a score of infinity.
local wait_ms = next_due and math.floor(math.max(0, math.min(MAX_TTL, next_due - now)) * 1000) or -1
return {moved, wait_ms, struck_off, unpack(rate_limits)}
