-- Reads jobs without what is too long to be a job's: a field may have hundreds of MB.
--
-- KEYS     the jobs' hashes
-- ARGV[1]  bytes of a field beyond which it is left out
-- ARGV[2]  the same for `data`
-- ARGV[3+] the names of the fields to read, without `data`
--
-- Returns for each job {name, value, name, value, ...}, false where no hash is.

local found = {}
for i, key in ipairs(KEYS) do
  found[i] = false
  if redis.call('TYPE', key).ok == 'hash' then
    local fields = {}
    local function read(name, max_bytes)
      local length = redis.call('HSTRLEN', key, name)
      if length > 0 and length <= max_bytes then
        fields[#fields + 1] = name
        fields[#fields + 1] = redis.call('HGET', key, name)
      end
    end
    read('data', tonumber(ARGV[2]))
    for j = 3, #ARGV do
      read(ARGV[j], tonumber(ARGV[1]))
    end
    found[i] = fields
  end
end
return found
