-- Looks at what waits on one queue: how many jobs, and of a sample of them their texts, bytes and ages. Changes nothing,
-- reads no job's data, and costs about the same however long the queue is.
--
-- KEYS     none: to name one, its user would need the right to write it
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the queue's name
-- ARGV[3]  at most so many jobs are looked at
--
-- Returns {jobs that wait, ids looked at, those of a job, their texts, bytes of their data, the earliest enqueued_at or
-- '', now in seconds}. A list of another type counts as empty, and so does a job's key.

local MAX_TEXTS = 1024 -- of a job; what it says of itself is not to be believed
local RUN = 16 -- neighbours looked at together, at least: each run is a walk through the list
local IDS_PER_NODE = 200 -- of Redis' list, where ids are 32 characters long
local MAX_STEPS = 40000 -- from node to node in one call, about
local TIME = '^2%d%d%d%-[01]%d%-[0-3]%dT[0-2]%d:[0-5]%d:[0-6]%d'
local MAX_TIME_BYTES = 64

local list, job_prefix, limit = ARGV[1] .. ':queue:' .. ARGV[2], ARGV[1] .. ':job:', tonumber(ARGV[3])
local looked, found, texts, bytes, oldest = 0, 0, 0, 0, ''

local function look(id)
  local key = job_prefix .. id
  local fields = redis.pcall('HMGET', key, 'embedq_texts', 'enqueued_at', 'status')
  looked = looked + 1
  if fields.err then
    if not string.find(fields.err, 'WRONGTYPE', 1, true) then
      error(fields.err, 0) -- this user may not look at jobs
    end
    return
  end
  if (fields[3] or '') == '' then
    return -- vanished
  end
  local enqueued_at = fields[2] or ''
  found = found + 1
  texts = texts + math.max(1, math.min(MAX_TEXTS, seconds(fields[1], 1)))
  bytes = bytes + redis.call('HSTRLEN', key, 'data')
  if #enqueued_at <= MAX_TIME_BYTES and string.find(enqueued_at, TIME) and (oldest == '' or enqueued_at < oldest) then
    oldest = enqueued_at
  end
end

local function look_from(start, number)
  for _, id in ipairs(redis.call('LRANGE', list, start, start + number - 1)) do
    look(id)
  end
end

local length = redis.pcall('LLEN', list)
if type(length) == 'table' then
  if not string.find(length.err, 'WRONGTYPE', 1, true) then
    return length
  end
  length = 0
end
if length <= limit then
  look_from(0, length)
else
  -- To a place in the middle Redis walks from the nearer end: a quarter of the list on average. In a list too long for
  -- that only its ends are looked at.
  local runs = math.floor(MAX_STEPS / (length / 4 / IDS_PER_NODE))
  runs = math.max(2, math.min(runs, math.floor(limit / RUN)))
  local number = math.max(1, math.floor(limit / runs))
  for i = 0, runs - 1 do
    look_from(math.floor(i * (length - number) / (runs - 1)), number)
  end
end
return {length, looked, found, texts, bytes, oldest, string.format('%.6f', clock())}
